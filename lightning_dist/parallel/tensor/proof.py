"""A part is what the plan took it for: seen once, before anything is trained on it.

[Note: parts are proved]
The plan recognises attention and feed-forward modules by what they are made of; what their forward does with the
numbers that it sees is its own affair. One that scales its scores by ``width // self.num_heads``, say, gets this rank's
heads and another scale, and no error would tell. So the first time that a kind of module runs, it runs twice more, as a
part and whole, without dropout, and the outputs are compared, and the gradients that reach its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from lightning_dist.parallel.tensor.region import Region, whole
from lightning_dist.parallel.tensor.shards import local_part
from lightning_dist.parallel.tensor.users_hooks import without_users_hooks

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative difference of outputs that is taken for rounding."""

COARSE_ROUNDING = 0.05
"""The same where something is computed in 16 bits, or in 19 (TF32)."""


class Proof:
    """Of the modules of one plan; see [Note: parts are proved].

    Args:
        mesh: of the tensor axis.

    Communication: for each kind of module, once: the gathering of its parameters over ``mesh``, its own collectives
    once more, and one all-reduce of a number.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self._seen: set[Any] = set()

    def is_due(self, module: nn.Module) -> bool:
        """Whether a module of this kind did not run yet. Compiled ones are not looked at."""
        return not torch.compiler.is_compiling() and _kind(module) not in self._seen

    @torch.no_grad()
    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compares.

        Raises:
            ValueError: on every rank of the axis, if the part gives another result than the whole.
        """
        self._seen.add(_kind(module))
        region = Region.of(module)
        assert region is not None
        if region.is_given_own(args, kwargs):
            return  # made by another part: the whole module could not use it
        with without_users_hooks(module):
            expected, part = both_ways(module, region, args, kwargs)
            gradients = self._gradient_difference(module, region, args, kwargs)
        if part.shape != expected.shape:  # it goes on divided
            expected = local_part(expected, Shard(expected.ndim - 1), self.mesh)
        difference = torch.full((), torch.inf, device=part.device)
        if part.shape == expected.shape:
            difference = (part - expected).float().norm() / expected.float().norm().clamp(min=1e-12)
        dist.all_reduce(difference, dist.ReduceOp.MAX, self.mesh.get_group())
        if not float(difference) <= rounding_of(part):
            raise ValueError(
                f"tp runs {type(module).__name__} on each rank's heads or columns, and that gives another result than "
                f"the whole module (relative difference {float(difference):.1e}): its forward does something with its "
                "sizes that tp does not know. Name the layers that may be divided in tensor_plan=, and leave these out"
            )
        if not gradients <= 10 * rounding_of(part):
            raise ValueError(
                f"tp runs {type(module).__name__} on each rank's heads or columns, and that sends another gradient to "
                f"its input than the whole module (relative difference {gradients:.1e}): its forward uses the input "
                "beside its divided layers too, in a residual connection of its own. Name its layers in tensor_plan= "
                '(the first "colwise", the last "rowwise"), and they are divided one by one'
            )

    @torch.enable_grad()
    def _gradient_difference(
        self, module: nn.Module, region: Region, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> float:
        """Of the gradients that reach the inputs, between the part and the whole; 0 where none is asked for."""
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not (region.enters and region.positions is None and leaves):
            return 0.0
        inputs = {id(leaf): leaf.detach().requires_grad_() for leaf in leaves}

        def fresh(leaf: Any) -> Any:
            return inputs.get(id(leaf), leaf)

        given, named = tree_map(_without_cache, (tree_map(fresh, args), tree_map(fresh, kwargs)))
        # checkpointing of activations keeps nothing of what this saves, in the first run or in the second
        with _disable_current_modes(), saved_tensors_hooks(_as_it_is, _as_it_is), _evaluated(module):
            with whole(module):
                whole_output = _first(type(module).forward(module, *given, **named))
            output = _first(region.run(module, given, named))
            if output.shape != whole_output.shape:  # it goes on divided
                return 0.0
            expected, part = _gradients(whole_output, inputs), _gradients(output, inputs)
        if expected is None or part is None:
            return 0.0
        difference = (part - expected).norm() / expected.norm().clamp(min=1e-12)
        dist.all_reduce(difference, dist.ReduceOp.MAX, self.mesh.get_group())
        return float(difference)


@torch.no_grad()
def both_ways(
    module: nn.Module,
    region: Region,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    around_whole: AbstractContextManager[Any] | None = None,
    around_part: AbstractContextManager[Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """The first output of a module that runs whole, and of one that runs on this rank's part, without dropout.

    Args:
        module: that is a region.
        region: its own.
        args, kwargs: of its forward.
        around_whole, around_part: what is entered while each runs.

    Communication: gathers the module's parameters over the axis, and the module's own collectives.
    """
    args, kwargs = tree_map(_without_cache, (args, kwargs))
    with _disable_current_modes(), _evaluated(module):  # selective checkpointing would keep what this computes
        with whole(module), around_whole or nullcontext():
            whole_args, whole_kwargs = region.whole_arguments(args, kwargs)
            expected = _first(type(module).forward(module, *whole_args, **whole_kwargs))
        with around_part or nullcontext():
            part = region.whole_output(_first(region.run(module, args, kwargs)))
    return expected, part


def _gradients(output: Tensor, inputs: dict[int, Tensor]) -> Tensor | None:
    """Of a sum of the output's elements, each times a number of its own, for all inputs, as one vector."""
    if not output.requires_grad:
        return None
    weights = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype).view(output.shape)
    found = torch.autograd.grad((output * weights).sum(), list(inputs.values()), allow_unused=True)
    given = [gradient.flatten().double() for gradient in found if gradient is not None]
    return torch.cat(given) if given else None


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def rounding_of(output: Tensor) -> float:
    """The relative difference from this output that is taken for rounding."""
    reduced = output.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    if reduced or torch.is_autocast_enabled(output.device.type):
        return COARSE_ROUNDING
    return ROUNDING.get(output.dtype, COARSE_ROUNDING)


def _kind(module: nn.Module) -> Any:
    return type(module), tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def _without_cache(value: Any) -> Any:
    """None for a cache of keys and values (transformers), which a run would write to."""
    return None if hasattr(value, "get_seq_length") else value


def _first(output: Any) -> Tensor:
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True
