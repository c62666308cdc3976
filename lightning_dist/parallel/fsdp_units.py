"""What fully_shard takes of a module: units, roots, the dtypes in a unit, and the parameters that stay whole.

[Note: dtypes in a unit]
fully_shard has one dtype in which the parameters of a unit are gathered. Under autocast that is wrong for some of them:
in one process an embedding's output and a norm's weights are float32, and a norm on the CPU takes no weights of 16 bits
beside inputs of 32. The unit still has one all-gather, of bytes, and one reduce-scatter, in float32: gradients of 16
bits are cast before it where fully_shard would cast them in it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torchmetrics import Metric

from lightning_dist.compat.distributed import gathered_of, param_groups_of, place_of, wrap_decide_dtypes
from lightning_dist.placeholder import is_placeholder

Place = tuple[int, str]
"""A module, by id, and the name of a parameter in it."""


def unsharded_parameters(module: nn.Module, units: dict[str, nn.Module]) -> set[nn.Parameter]:
    """What ``fully_shard`` leaves alone: parameters of metrics' own networks, and what it can't split.

    That is scalars, parameters without elements, complex ones, and those of another dtype than most of their unit
    (seen in torch 2.14). They stay whole on every rank.
    """
    aside = {p for child in module.modules() if isinstance(child, Metric) for p in child.parameters()}
    # what is divided over the tensor axis is a DTensor already, whose number of elements is the whole's
    aside |= {p for p in module.parameters() if is_placeholder(p) or p.ndim == 0 or p.numel() == 0 or p.is_complex()}
    return aside | _of_odd_dtype(module, units, aside)


def _of_odd_dtype(module: nn.Module, units: dict[str, nn.Module], aside: set[nn.Parameter]) -> set[nn.Parameter]:
    """The trained parameters of another dtype than most of their unit: a unit's gradients travel as one tensor."""
    of_unit: dict[str, dict[torch.dtype, list[tuple[str, nn.Parameter]]]] = defaultdict(lambda: defaultdict(list))
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter not in aside:
            unit = max((u for u in units if not u or name.startswith(f"{u}.")), key=len, default=None)
            if unit is not None:
                of_unit[unit][parameter.dtype].append((name, parameter))
    odd: dict[str, nn.Parameter] = {}
    for of_dtype in of_unit.values():
        most = max(of_dtype, key=lambda dtype: sum(p.numel() for _, p in of_dtype[dtype]))
        odd.update(named for dtype, those in of_dtype.items() if dtype != most for named in those)
    if odd:
        rank_zero_warn(
            f"{', '.join(odd)}: of another dtype than most of the parameters that dp_shard gathers with them, so they "
            "stay whole on every rank. A module of its own in shard_units= may be of another dtype as a whole"
        )
    return set(odd.values())


def shard_roots(module: nn.Module) -> dict[str, nn.Module]:
    """The modules that own what is in no block, by name; ``""`` is the LightningModule itself.

    See [Note: the roots of sharding].

    Raises:
        ValueError: two networks share a parameter under manual optimisation.
    """
    if not isinstance(module, pl.LightningModule) or module.automatic_optimization:
        return {"": module}
    roots: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if not isinstance(child, Metric) and any(True for _ in child.parameters()):
            roots.update(_callable_modules(name, child))
    if shared := _shared_between(roots):
        raise ValueError(
            f"{' and '.join(shared)} share a parameter, and this module optimises manually: dp_shard can't keep it "
            "in one place while several backward passes run in a step; use dp_replicate, or put both networks "
            "into one module with a forward"
        )
    return roots


def _callable_modules(name: str, module: nn.Module) -> dict[str, nn.Module]:
    """The module, or what a list or a dictionary of modules (which have no forward) holds."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return {name: module}
    found: dict[str, nn.Module] = {}
    for key, child in module.named_children():
        if any(True for _ in child.parameters()):
            found.update(_callable_modules(f"{name}.{key}", child))
    return found


def _shared_between(modules: dict[str, nn.Module]) -> list[str]:
    owner: dict[nn.Parameter, str] = {}
    for name, module in modules.items():
        for parameter in module.parameters():
            if owner.setdefault(parameter, name) != name:
                return [owner[parameter], name]
    return []


def shard_units(module: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The blocks that can be sharded on their own: those that share no parameter with the rest of the module."""
    users = _uses(module)
    return {
        name: block
        for name, block in blocks.items()
        if all(users[parameter] == count for parameter, count in _uses(block).items())
    }


def _uses(module: nn.Module) -> Counter[nn.Parameter]:
    return Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))


def places(module: nn.Module, parameters: Collection[nn.Parameter]) -> set[Place]:
    """Where parameters are; fully_shard puts others in their places."""
    return {
        (id(child), name)
        for child in module.modules()
        for name, parameter in child.named_parameters(recurse=False)
        if parameter in parameters
    }


def gather_as_kept(unit: nn.Module, rounded: set[Place]) -> None:
    """Has a sharded unit gather its parameters in the dtype in which they are kept, but for those in some places."""
    for param_group in param_groups_of(unit):
        wrap_decide_dtypes(param_group, partial(_decide_dtypes, param_group, rounded))


def _decide_dtypes(param_group: Any, rounded: set[Place], decide: Callable[[], None]) -> None:
    decide()
    for parameter in param_group.fsdp_params:
        module, name = place_of(parameter)
        if (id(module), name) not in rounded:
            parameter.param_dtype = None


def prefetch(module: nn.Module, units: dict[str, Any], number: int) -> None:
    """Has each sharded unit of a module start to gather so many of those after it in the module before it runs, and of
    those before it before its backward. One, which torch does by itself, changes nothing.
    """
    ordered: list[Any] = [unit for name, unit in module.named_modules() if name in units]
    for index, unit in enumerate(ordered if number > 1 else ()):
        unit.set_modules_to_forward_prefetch(ordered[index + 1 : index + 1 + number])
        unit.set_modules_to_backward_prefetch(ordered[max(0, index - number) : index][::-1])


def make_gradients_alike(param_group: Any) -> None:
    """Casts gradients of 16 bits before their unit reduces them, if others are not; see [Note: dtypes in a unit]."""
    if len({parameter.param_dtype for parameter in param_group.fsdp_params}) < 2:
        return
    for parameter in param_group.fsdp_params:
        if gathered_of(parameter) is not None:
            parameter.accumulate_unsharded_grad_if_needed()
            parameter.to_accumulated_grad_if_needed()
