"""The shard axis: parameters, gradients and optimizer states are split; perhaps copied over the replicate axis."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torchmetrics import Metric

from lightning_dist.collectives import all_reduce_tensors
from lightning_dist.divided.copies import make_copyable, pass_for_own_class
from lightning_dist.parallel.buffers import WrittenBuffers
from lightning_dist.parallel.data import CALL, STEPS, Alone
from lightning_dist.parallel.mixed import gather_as_kept, param_groups_of, places
from lightning_dist.parallel.usage import Usage, filled, free_outdated
from lightning_dist.placeholder import is_placeholder
from lightning_dist.precision import cast_by_autocast


class Sharded(Alone):
    """Parameters, gradients and optimizer states are split over ``dp_shard``, and copied over ``dp_replicate``.

    Units are sharded by ``fully_shard`` (FSDP2): each is gathered before its forward and its backward and freed after.

    [Note: the roots of sharding]
    What is in no block belongs to a root. What Fabric calls is one. The LightningModule is the root of its steps: what
    they call, be it the network, a method or a layer of it, finds its parameters gathered. In hooks between the steps,
    calling the module or a network of it gathers too. Under manual optimisation a root must not span the step, in which
    optimizers change what was gathered: there each network of the module is a root of its own, gathered when it is
    called. Scalars, which can't be split, other parameters that fully_shard can't take (see
    :func:`unsharded_parameters`), and under manual optimisation those of the LightningModule itself, stay whole on
    every rank; their gradients are averaged after each backward pass. Under a pipeline a step has one backward pass,
    and optimizers step after it.

    Communication per unit and pass over ``dp_shard``: one all-gather before the forward and one before the backward
    (none for a root's backward), one reduce-scatter after the backward, then one all-reduce of the shard over
    ``dp_replicate`` if that axis is there. Per backward pass that reduces: one small all-reduce over the data ranks,
    see :meth:`~lightning_dist.parallel.usage.Usage.agree`, and one of the gradients of what is whole, if anything is.
    """

    def __init__(
        self,
        module: nn.Module,
        mesh: DeviceMesh,
        blocks: dict[str, nn.Module],
        policy: MixedPrecisionPolicy,
        group: dist.ProcessGroup,
        one_backward: bool = False,
    ) -> None:
        super().__init__(module)
        self.group = group
        self.roots = {"": module} if one_backward else shard_roots(module)
        self.units = shard_units(module, blocks)
        units = {**self.units, **self.roots}
        whole = unsharded_parameters(module, units)
        rounded = places(module, cast_by_autocast(module))  # of no effect where the policy rounds nothing
        for unit in units.values():
            if not isinstance(unit, FSDPModule):
                fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=whole)
                make_copyable(unit)
                pass_for_own_class(unit)
                gather_as_kept(unit, rounded)
        left = [n for n, p in module.named_parameters() if not isinstance(p, DTensor) and not is_placeholder(p)]
        self.buffers = WrittenBuffers(module, group)
        self.usage = Usage(module, units, set(self.roots), left, group, self.buffers)
        if "" in self.roots and "_root_gathering" not in vars(module):
            vars(module)["_root_gathering"] = _RootGathering(module)
        self._root_gathering: _RootGathering | None = vars(module).get("_root_gathering")

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        if self._root_gathering is None:
            return super().call(function, *args)
        return super().call(self._root_gathering.run, function, *args)

    def users_step(self, name: str) -> Callable[..., Any]:
        steps = {} if self._root_gathering is None else self._root_gathering.plain
        return steps.get(name) or super().users_step(name)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        self._reduce_gradients(False)
        try:
            with super().accumulating():
                yield
        finally:
            self._reduce_gradients(True)

    def _reduce_gradients(self, reduces: bool) -> None:
        for root in self.roots.values():
            assert isinstance(root, FSDPModule)
            root.set_requires_gradient_sync(reduces)

    def reshard(self) -> None:
        for unit in [*self.units.values(), *self.roots.values()]:
            assert isinstance(unit, FSDPModule)
            unit.reshard()

    def forget_step(self) -> None:
        for root in self.roots.values():
            assert isinstance(root, FSDPModule)
            if root._get_fsdp_state()._is_root is not None:  # private; seen in torch 2.14: None before a first forward
                root.reset_iter_state()
        self.usage.forget()

    @contextmanager
    def over_microbatches(self, reshard: bool) -> Iterator[None]:
        """While it lasts, backward passes add to whole gradients, and nothing is reduced: see :meth:`reduce_held`.

        Args:
            reshard: free what was gathered after each pass, and gather it again for the next. Else it stays gathered.
        """
        for unit in self.units.values():
            assert isinstance(unit, FSDPModule)
            unit.set_reshard_after_forward(reshard, recurse=False)
        for root in self.roots.values():
            assert isinstance(root, FSDPModule)
            root.set_reshard_after_backward(reshard)
            root.set_is_last_backward(False)
        self._reduce_gradients(False)
        self.usage.second.refuses = True
        try:
            yield
        finally:
            self.usage.second.refuses = False
            for unit in self.units.values():
                assert isinstance(unit, FSDPModule)
                unit.set_reshard_after_forward(True, recurse=False)

    def reduce_held(self) -> None:
        """Reduces the gradients that backward passes over microbatches added up.

        As torch's pipeline schedules do for a stage (``perform_reduce_grad``; private, seen in torch 2.14).

        Communication: one reduce-scatter a unit, as one backward pass has.
        """
        self.usage.before_backward()
        self._reduce_gradients(True)
        for root in self.roots.values():
            assert isinstance(root, FSDPModule)
            root.set_is_last_backward(True)
            root.set_reshard_after_backward(True)
        self._reduce_what_is_left()

    def _reduce_what_is_left(self) -> None:
        for root in self.roots.values():
            assert isinstance(root, FSDPModule)
            state = root._get_fsdp_state()
            for inner in state._state_ctx.all_states:
                for group in inner._fsdp_param_groups:
                    group.post_backward()
            state._root_post_backward_final_callback()

    def skip_backward(self, held: bool) -> None:
        if self.reduces and held:
            self.reduce_held()
            self.after_backward()

    def before_backward(self, loss: Tensor) -> Tensor:
        self.usage.before_backward()
        return super().before_backward(loss)

    def after_backward(self) -> None:
        if self.usage.second.end() and self.reduces:
            self._reduce_what_is_left()
        self.usage.second.free()
        if not self.reduces:
            return
        all_reduce_tensors([filled(p) for p in self.usage.agree()], self.group, mean=True)
        super().after_backward()


class _RootGathering:
    """Gathers a module around the outermost call of its steps and its forward, and of a child between them.

    fully_shard's own hooks of the forward would free the root at the end of ``self(x)`` in a step, for the step's end
    to gather it once more (seen in torch 2.14 and 2.15). See [Note: the roots of sharding].
    """

    def __init__(self, module: Any) -> None:
        self._inside = False
        self._param_groups = param_groups_of(module)
        module._instance_methods = {}  # a copy gets those back that were there before
        state = module._get_fsdp_state()
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        module._gather_root = lambda function, *args: function(*args)
        self.plain: dict[str, Callable[..., Any]] = {}
        """The module's methods that are wrapped, as they were."""
        self._module = module
        for name in ("forward", *STEPS, CALL, "_gather_root"):
            # a step may be None, to have none
            if callable(getattr(module, name, None)) and (name in vars(module) or _has_own(module, name)):
                self._gather_around(module, name)

        @torch.compiler.disable
        def gather_root(*_: Any) -> None:
            module._gather_root(lambda: None)

        for child in module.children():
            child.register_forward_pre_hook(gather_root)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs a function while the module is gathered."""
        return self._module._gather_root(function, *args)

    def _gather_around(self, module: Any, name: str) -> None:
        module._instance_methods[name] = vars(module).get(name)
        plain = self.plain[name] = getattr(module, name)
        register_fsdp_forward_method(module, name)
        gathering = getattr(module, name)

        @functools.wraps(plain)
        def outermost(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return plain(*args, **kwargs)
            self._inside = True
            free_outdated(self._param_groups)
            try:
                return gathering(*args, **kwargs)
            finally:
                self._inside = False

        setattr(module, name, outermost)


def _has_own(module: nn.Module, name: str) -> bool:
    """Whether the module's class has a method that is not Lightning's empty one."""
    if isinstance(module, pl.LightningModule):
        return name != CALL and is_overridden(name, module)
    return hasattr(type(module), name)


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
    """Of each unit's trained parameters those of another dtype than most: gradients of a unit travel as one tensor."""
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
