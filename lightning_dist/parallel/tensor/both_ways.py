"""A module that runs whole and on this rank's part, side by side."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dist.compat.torch import MODULE_REGISTRIES, disable_current_modes
from lightning_dist.parallel.rehearsal import FixedNumbers
from lightning_dist.parallel.tensor.region import Region, whole
from lightning_dist.pytree import tree_leaves, tree_map

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative difference of outputs that is taken for rounding."""

COARSE_ROUNDING = 0.05
"""The same where something is computed in 16 bits, or in 19 (TF32)."""


class PartFailed(Exception):
    """A part raised where the whole module did not; its cause says what."""


@torch.no_grad()
def both_ways(
    module: nn.Module,
    region: Region,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    around_whole: AbstractContextManager[Any] | None = None,
    around_part: AbstractContextManager[Any] | None = None,
    watched: dict[str, Any] | None = None,
) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """The outputs of a module that runs whole, and of one that runs on this rank's part, without randomness.

    Args:
        module: that is a region.
        region: its own.
        args, kwargs: of its forward.
        around_whole, around_part: what is entered while each runs.
        watched: the tensors that modules in it have as attributes, by name; None not to look.

    Returns:
        The tensors among what it returns, whole and in part, and names of attributes that it set to other tensors.

    Raises:
        PartFailed: the part raised.

    Communication: gathers the module's parameters over the axis, and the module's own collectives.
    """
    args, kwargs = tree_map(without_cache, (args, kwargs))
    with disable_current_modes(), FixedNumbers():  # selective checkpointing would keep what this computes
        with whole(module), around_whole or nullcontext():
            whole_args, whole_kwargs = region.whole_arguments(args, kwargs)
            expected = tensors_in(type(module).forward(module, *whole_args, **whole_kwargs))
        kept = {} if watched is None else tensor_attributes(module)
        with around_part or nullcontext():
            try:
                first, *others = tensors_in(region.run(module, args, kwargs))
            except Exception as error:
                if isinstance(error, ValueError) and str(error).startswith("tp "):
                    raise  # a part inside of it
                raise PartFailed from error
            part = [region.whole_output(first), *others]
    differing = [] if watched is None else _differing(watched, kept, tensor_attributes(module))
    return expected, part, differing


def tensor_attributes(module: nn.Module) -> dict[str, Any]:
    """Tensors that modules in it have as attributes, and those in lists and dictionaries there, by name."""
    found: dict[str, Any] = {}
    for name, child in module.named_modules():
        for key, value in vars(child).items():
            if key in MODULE_REGISTRIES:
                continue
            tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
            if tensors:
                found[f"{name}.{key}".strip(".")] = tensors
    return found


def _differing(before: dict[str, Any], of_whole: dict[str, Any], of_part: dict[str, Any]) -> list[str]:
    """Attributes that both ways set, to other values."""
    found = []
    for name, tensors in of_part.items():
        if _same_objects(tensors, before.get(name, [])) and _same_objects(of_whole.get(name, []), before.get(name, [])):
            continue
        theirs = of_whole.get(name, [])
        mine = tensors[len(tensors) - len(theirs) :] if len(tensors) > len(theirs) else tensors
        alike = len(mine) == len(theirs) and all(m.shape == t.shape for m, t in zip(mine, theirs, strict=True))
        if not alike or not all(
            float((m - t).double().norm()) <= rounding_of(m) * max(float(t.double().norm()), 1e-6)
            for m, t in zip(mine, theirs, strict=True)
        ):
            found.append(name)
    return found


def _same_objects(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def rounding_of(output: Tensor) -> float:
    """The relative difference from this output that is taken for rounding."""
    reduced = output.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    if reduced or torch.is_autocast_enabled(output.device.type):
        return COARSE_ROUNDING
    return ROUNDING.get(output.dtype, COARSE_ROUNDING)


def without_cache(value: Any) -> Any:
    """None for a cache of keys and values (transformers), which a run would write to."""
    return None if hasattr(value, "get_seq_length") else value


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors among what a forward returned."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
