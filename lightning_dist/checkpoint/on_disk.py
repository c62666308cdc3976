"""Tensors of a checkpoint for a module that is not divided yet: read when it is known what of them is used."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_dist.placeholder import is_placeholder
from lightning_dist.pytree import Path, map_leaves, tree_map_only


class Reader(Protocol):
    """Of the tensors of a checkpoint, by key."""

    def whole(self, key: str) -> Tensor:
        """The plain tensor, in host memory."""

    def in_layout(self, likes: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this rank holds of tensors, as of others of their shapes. Every rank calls it."""


class OnDisk(Tensor):
    """A tensor of a checkpoint that is read, whole, by the first code that asks for its values.

    Hooks that Lightning calls with a checkpoint may rename it, look at its shape, compute with it or change it, as a
    plain tensor. What nobody has touched when it is loaded is read by :func:`in_layout_of`, in the layout of what it
    is loaded into.

    Args:
        reader: of its checkpoint.
        key: of the tensor there.
        shape: of the tensor.
        dtype: of the tensor.
    """

    reader: Reader
    key: str
    value: Tensor | None
    """Once it was read; what the hooks made of it."""

    @staticmethod
    def __new__(cls, reader: Reader, key: str, shape: torch.Size, dtype: torch.dtype) -> OnDisk:  # noqa: D102
        made: OnDisk = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device("cpu"))
        made.reader, made.key, made.value = reader, key, None
        _made.append(weakref.ref(made))
        return made

    def plain(self) -> Tensor:
        """With its values, which are kept."""
        if self.value is None:
            self.value = self.reader.whole(self.key)
        return self.value

    def once(self) -> Tensor:
        """With its values, which are not kept."""
        return self.reader.whole(self.key) if self.value is None else self.value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OF_THE_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        # a parameter that takes the values over
        read = OnDisk.once if func is Tensor.copy_ and type(args[0]) is not OnDisk else OnDisk.plain
        args, kwargs = tree_map_only(OnDisk, read, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(OnDisk, OnDisk.plain, (args, kwargs or {}))
        return func(*args, **kwargs)


_OF_THE_SHAPE = {
    *(Tensor.__len__, Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.element_size),
    *(Tensor.is_floating_point, Tensor.is_complex),
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("is_meta", "is_sparse", "is_quantized", "is_leaf", "nbytes")),
}


def read_what_is_kept() -> None:
    """Once a checkpoint has been restored: the next may replace its files, and what hooks have kept of it must stay.

    Communication: none.
    """
    kept = [tensor for made in _made if (tensor := made()) is not None]
    _made.clear()
    for tensor in kept:
        tensor.plain()


_made: list[weakref.ref[OnDisk]] = []


def in_layout_of(tree: Any, like: Callable[[Path], Any]) -> Any:
    """The tree with what is :class:`OnDisk` in it as the ranks hold it.

    Args:
        tree: nested containers.
        like: the tensor that what is at a path is loaded into. For a DTensor of its shape, this rank's part is read;
            for a placeholder of another stage's tensor, nothing. For any other it stays as it is, and is read when it
            is copied.

    Communication: where the tree has any, the verdict on what was read: an all-gather of a short string over the world.
    """
    wanted: dict[Reader, dict[str, Tensor]] = {}

    def note(path: Path, value: Any) -> Any:
        if type(value) is OnDisk:
            of_reader = wanted.setdefault(value.reader, {})  # all ranks ask it, whatever they want
            target = like(path)
            is_part = isinstance(target, DTensor) and target.shape == value.shape
            if value.value is None and target is not None and (is_part or is_placeholder(target)):
                of_reader.setdefault(value.key, target)
        return value

    map_leaves(tree, note)
    found = {reader: reader.in_layout(likes) for reader, likes in wanted.items()}

    def put(path: Path, value: Any) -> Any:
        if type(value) is not OnDisk:
            return value
        if value.value is not None:
            return value.value
        return found.get(value.reader, {}).get(value.key, value)

    return map_leaves(tree, put)
