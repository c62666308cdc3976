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
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lightning_dist.compat import distributed as private
from lightning_dist.divided.copies import ROOT_GATHERING, make_copyable, pass_for_own_class
from lightning_dist.parallel.buffers import WrittenBuffers
from lightning_dist.parallel.fsdp_units import (
    gather_as_kept,
    places,
    prefetch,
    shard_roots,
    shard_units,
    unsharded_parameters,
)
from lightning_dist.parallel.shard_options import ShardOptions, kept_gathered, large_layers, parts_of_blocks
from lightning_dist.parallel.single_process import CALL, STEPS, SingleProcessRunner
from lightning_dist.parallel.tensor.split import TensorAxis
from lightning_dist.parallel.unused_parameters import UnusedParameters, free_outdated
from lightning_dist.patches import Patches
from lightning_dist.placeholder import is_placeholder
from lightning_dist.precision import cast_by_autocast


class FSDPRunner(SingleProcessRunner):
    """Runs the steps of a module whose parameters, gradients and optimizer states are split over ``dp_shard``, and
    copied over ``dp_replicate``, by ``fully_shard`` (FSDP2): each unit is gathered before its forward and its backward
    and freed after.

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
    (none for the backward of a root and of what :func:`kept_gathered` names, nor with ``reshard_after_forward=False``,
    which keeps all that was gathered from forward to backward), one reduce-scatter after the backward, then one
    all-reduce of the shard over ``dp_replicate`` if that axis is there. Per backward pass that reduces: those of
    :meth:`~lightning_dist.parallel.unused_parameters.UnusedParameters.agree`, a small one and one of the gradients of
    what is whole, if anything is.

    Args:
        module: to shard, in place.
        mesh: of ``dp_shard``, or of ``dp_replicate`` and ``dp_shard``.
        blocks: the repeated parts, by name.
        policy: dtypes of the units.
        options: the user's.
        group: the data ranks.
        patches: that what is put on the module goes through; with it fully_shard is taken off again.
        tensor: the tensor axis, where the layout has one.
        one_backward: whether a step has one backward pass, whatever the module says: under a pipeline.
    """

    def __init__(
        self,
        module: nn.Module,
        mesh: DeviceMesh,
        blocks: dict[str, nn.Module],
        policy: MixedPrecisionPolicy,
        options: ShardOptions,
        group: dist.ProcessGroup,
        patches: Patches,
        tensor: TensorAxis | None = None,
        one_backward: bool = False,
    ) -> None:
        super().__init__(module, tensor)
        self.group = group
        self.roots: dict[str, Any] = {"": module} if one_backward else dict(shard_roots(module))
        layers = large_layers(module, blocks) if options.large_layers else {}
        layers = {name: layer for name, layer in layers.items() if name not in self.roots}
        parts = parts_of_blocks(blocks, options.max_unit_parameters)  # to be sharded before what they are in
        self.units: dict[str, Any] = shard_units(module, {**dict(reversed(parts.items())), **blocks, **layers})
        units = {**self.units, **self.roots}
        stay = kept_gathered(module, self.units, blocks) if options.reshard_after_forward else set(self.units)
        self._reshards = {name: name not in stay for name in self.units}
        whole = unsharded_parameters(module, units)
        rounded = places(module, cast_by_autocast(module))  # of no effect where the policy rounds nothing
        offload = options.offload_policy(torch.device(mesh.device_type))
        for name, unit in units.items():
            if not isinstance(unit, FSDPModule):
                reshards = self._reshards.get(name)  # None for a root, of which fully_shard knows that it stays
                with _originals_stay(unit):
                    fully_shard(
                        unit,
                        mesh=mesh,
                        reshard_after_forward=reshards,
                        mp_policy=policy,
                        offload_policy=offload,
                        ignored_params=whole,
                    )
                patches.also(functools.partial(private.remove_fully_shard, unit))
                make_copyable(unit, patches)
                pass_for_own_class(unit)
                gather_as_kept(unit, rounded)
        prefetch(module, self.units, options.prefetch_units)
        left = [n for n, p in module.named_parameters() if not isinstance(p, DTensor) and not is_placeholder(p)]
        self.buffers = WrittenBuffers(module, group)
        self.unused = UnusedParameters(module, units, set(self.roots), left, group, self.buffers, patches)
        self.root = RootGathering.of(module, patches) if "" in self.roots else None
        """Around a step; None where the networks of the module gather themselves, each when it is called."""

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.unused.before_step()
        gathered = function if self.root is None else functools.partial(self.root.call, function)
        return super().call(gathered, *args, **kwargs)

    def users_step(self, name: str) -> Callable[..., Any]:
        plain = None if self.root is None else self.root.plain.get(name)
        return plain or super().users_step(name)

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
            root.set_requires_gradient_sync(reduces)

    def reshard(self) -> None:
        for unit in [*self.units.values(), *self.roots.values()]:
            unit.reshard()

    def forget_step(self) -> None:
        for root in self.roots.values():
            if private.has_run(root):
                root.reset_iter_state()
        self.unused.forget()

    @contextmanager
    def over_microbatches(self, reshard: bool) -> Iterator[None]:
        """While it lasts, backward passes add to whole gradients, and nothing is reduced: see :meth:`reduce_held`.

        Args:
            reshard: free what was gathered after each pass, and gather it again for the next. Else it stays gathered.
        """
        for unit in self.units.values():
            unit.set_reshard_after_forward(reshard, recurse=False)
        for root in self.roots.values():
            root.set_reshard_after_backward(reshard)
            root.set_is_last_backward(False)
        self._reduce_gradients(False)
        self.unused.second.refuses = True
        try:
            yield
        finally:
            self.unused.second.refuses = False
            for name, unit in self.units.items():
                unit.set_reshard_after_forward(self._reshards[name], recurse=False)

    def reduce_held(self) -> None:
        """Reduces what backward passes over microbatches added up. Communication: as one backward pass has."""
        self.unused.before_backward()
        self._reduce_gradients(True)
        for root in self.roots.values():
            root.set_is_last_backward(True)
            root.set_reshard_after_backward(True)
        self._reduce_what_is_left()

    def _reduce_what_is_left(self) -> None:
        for root in self.roots.values():
            private.end_backward(root)

    def skip_backward(self, held: bool) -> None:
        if self.reduces and held:
            self.reduce_held()
            self.after_backward()

    def before_backward(self, loss: Tensor) -> Tensor:
        self.unused.before_backward()
        return super().before_backward(loss)

    def after_backward(self) -> None:
        if self.unused.second.end() and self.reduces:
            self._reduce_what_is_left()
        self.unused.second.free()
        if not self.reduces:
            return
        self.unused.agree()
        super().after_backward()

    def validate_steps(self) -> None:
        self.unused.validate()


@contextmanager
def _originals_stay(unit: nn.Module) -> Iterator[None]:
    """Leaves the parameters that fully_shard replaces where they were; it moves them to the device before it copies
    this rank's part, and who holds one still would keep the whole of it there.
    """
    before = [(p, p.data) for p in unit.parameters() if not isinstance(p, DTensor)]
    yield
    kept = {id(p) for p in unit.parameters()}
    for parameter, data in before:
        if id(parameter) not in kept:
            parameter.data = data


class RootGathering:
    """Gathers a root around the outermost call of its steps and its forward, and of a child between them.

    fully_shard's own hooks of the forward would free the root at the end of ``self(x)`` in a step, for the step's end
    to gather it once more (seen in torch 2.14 and 2.15). See [Note: the roots of sharding].

    All that it puts on the root and its children goes through ``patches``.
    """

    def __init__(self, module: Any, patches: Patches) -> None:
        self._module, self._inside = module, False
        self._param_groups = private.param_groups_of(module)
        private.remove_forward_hooks(module)
        self.methods_before: dict[str, Any] = {}
        """What the module itself had under the names of the methods that gather; None for nothing."""
        self.plain: dict[str, Callable[..., Any]] = {}
        """Those methods, as they were."""
        for name in ("forward", *STEPS, CALL):
            # a step may be None, to have none
            if callable(getattr(module, name, None)) and (name in vars(module) or _has_own(module, name)):
                self.methods_before[name] = vars(module).get(name)
                self.plain[name] = getattr(module, name)
                patches.set(module, name, self._gathering(self.plain[name]))

        @torch.compiler.disable
        def gather_root(*_: Any) -> None:
            self.call(lambda: None)

        for child in module.children():
            patches.also(child.register_forward_pre_hook(gather_root).remove)

    @classmethod
    def of(cls, module: nn.Module, patches: Patches) -> RootGathering:
        """That of a module, from an earlier run where it is still there."""
        if ROOT_GATHERING not in vars(module):
            patches.set(module, ROOT_GATHERING, cls(module, patches))
        return vars(module)[ROOT_GATHERING]

    def _gathering(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)  # Lightning looks at the signatures of steps
        def gathering(*args: Any, **kwargs: Any) -> Any:
            return self.call(plain, *args, **kwargs)

        return gathering

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a function with the root gathered."""
        if self._inside:
            return function(*args, **kwargs)
        self._inside = True
        free_outdated(self._param_groups)
        try:
            return private.call_gathered(self._module, function, args, kwargs)
        finally:
            self._inside = False


def _has_own(module: nn.Module, name: str) -> bool:
    """Whether the module's class has a method that is not Lightning's empty one."""
    if isinstance(module, pl.LightningModule):
        return name != CALL and is_overridden(name, module)
    return hasattr(type(module), name)
