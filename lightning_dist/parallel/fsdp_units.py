"""What fully_shard takes of a module: units, roots, and the parameters that stay whole on every rank."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torchmetrics import Metric

from lightning_dist.placeholder import is_placeholder


def unsharded_parameters(module: nn.Module, units: dict[str, nn.Module]) -> set[nn.Parameter]:
    """What ``fully_shard`` leaves alone: parameters of metrics' own networks, and what it can't split.

    That is scalars, parameters without elements, complex ones, and those of another dtype than most of their unit
    (seen in torch 2.14). They stay whole on every rank.
    """
    metrics = {p for child in module.modules() if isinstance(child, Metric) for p in child.parameters()}
    other_stages = {p for p in module.parameters() if is_placeholder(p)}
    # what is divided over the tensor axis is a DTensor already, whose number of elements is the whole's
    unsplit = {p for p in module.parameters() if p.ndim == 0 or p.numel() == 0 or p.is_complex()}
    aside = metrics | other_stages | unsplit
    return aside | _of_odd_dtype(module, units, aside)


def _of_odd_dtype(module: nn.Module, units: dict[str, nn.Module], aside: set[nn.Parameter]) -> set[nn.Parameter]:
    """The trained parameters of another dtype than most of their unit: a unit's gradients travel as one tensor."""
    of_unit: dict[str, dict[torch.dtype, list[tuple[str, nn.Parameter]]]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter not in aside:
            unit = max((u for u in units if not u or name.startswith(f"{u}.")), key=len, default=None)
            if unit is not None:
                of_unit.setdefault(unit, {}).setdefault(parameter.dtype, []).append((name, parameter))
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
    users: dict[nn.Parameter, int] = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        users[parameter] = users.get(parameter, 0) + 1
    alone = {}
    for name, block in blocks.items():
        inside: dict[nn.Parameter, int] = {}
        for _, parameter in block.named_parameters(remove_duplicate=False):
            inside[parameter] = inside.get(parameter, 0) + 1
        if all(users[parameter] == count for parameter, count in inside.items()):
            alone[name] = block
    return alone
