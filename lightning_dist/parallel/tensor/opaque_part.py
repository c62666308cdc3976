"""What a part returns of its own heads or columns beside its output, which nobody may take for the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_dist.compat.torch import DisableTorchFunctionSubclass
from lightning_dist.divided.functions import Way, way_of
from lightning_dist.pytree import tree_flatten, tree_map, tree_unflatten


class OpaquePart(Tensor):
    """A tensor of this rank's part, such as the attention weights of its heads, that may be passed on, and not used."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if way_of(func) is not Way.ASK:
            raise RuntimeError(
                "tp: a tensor that an attention or feed-forward module returns beside its output is this rank's part "
                "of it (of its heads, or columns): leave the module whole with tensor_plan=, or use another axis"
            )
        with DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def made_opaque(output: Any, own: frozenset[int]) -> Any:
    """What a part returned, with those of its tensors made opaque that are its own, by their number."""
    leaves, structure = tree_flatten(output)
    numbers = iter(range(len(leaves)))
    new = [
        leaf.as_subclass(OpaquePart) if isinstance(leaf, Tensor) and next(numbers) in own else leaf for leaf in leaves
    ]
    return tree_unflatten(new, structure)


def without_opaque(value: Any) -> Any:
    """The same as plain tensors, for parts, which know what they are."""
    return tree_map(_plain, value)


def _plain(leaf: Any) -> Any:
    if not isinstance(leaf, OpaquePart):
        return leaf
    with DisableTorchFunctionSubclass():
        return leaf.as_subclass(Tensor)
