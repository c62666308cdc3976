"""Tensors that lie in the files of a checkpoint, and are read when they are needed.

:class:`LazyTensor` is for who reads one after the other, in one process. :class:`OnDisk` is a tensor for hooks that see
a checkpoint before the module is divided: it is read when it is known what of it a rank holds.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_dist.compat.torch import wrapper_tensor
from lightning_dist.placeholder import is_placeholder
from lightning_dist.pytree import Path, map_leaves, tree_map_only

Advance = Callable[[int], None]
"""Is told how many bytes have been written, or read, since it was last told."""

PIECE = 1 << 24
"""Bytes that are read at once of a tensor whose rows can be read alone."""


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor that lies in a file. One object that is under two names is one tensor, tied.

    Args:
        read: makes the plain tensor, in host memory.
        read_rows: makes a part of it, between two indices of its first dim; None where that costs as much as all of it.
    """

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]
    read_rows: Callable[[int, int], Tensor] | None = None

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, largest: int) -> Iterator[tuple[int, int]]:
        """Begin and end of rows with at most so many bytes (or one row); of all where they can't be read alone."""
        count = self.shape[0] if self.ndim else 1
        if self.read_rows is None or not self.nbytes:
            yield 0, count
            return
        step = max(1, largest * count // self.nbytes)
        for begin in range(0, count, step):
            yield begin, min(begin + step, count)

    def read_some(self, begin: int, end: int) -> Tensor:
        """The plain tensor of rows, of :meth:`rows`."""
        if self.read_rows is None or (begin, end) == (0, self.shape[0]):
            return self.read()
        return self.read_rows(begin, end)

    def pieces(self) -> Iterator[memoryview]:
        """The bytes of the values in row-major order, a few rows at a time."""
        for begin, end in self.rows(PIECE):
            yield bytes_of(self.read_some(begin, end))


def leaves(tree: Any, skip: frozenset[type] = frozenset()) -> list[tuple[Path, Any]]:
    """What :func:`~lightning_dist.pytree.map_leaves` meets, with its paths."""
    found: list[tuple[Path, Any]] = []

    def note(path: Path, value: Any) -> Any:
        found.append((path, value))
        return value

    map_leaves(tree, note, skip=skip)
    return found


def read_into(file: IO[bytes], memory: Tensor) -> None:
    """Fills a contiguous tensor from where the file stands; an EOFError where that has less."""
    # not through numpy, which leaves the storage a fixed size that the planner of convert could not let go
    left = memoryview((ctypes.c_char * memory.nbytes).from_address(memory.data_ptr() or 1)).cast("B")
    while len(left):
        count = file.readinto(left[:PIECE])  # type: ignore[attr-defined]
        if not count:
            raise EOFError(f"{file.name} ends {len(left)} bytes too early")
        left = left[count:]


def bytes_of(tensor: Tensor) -> memoryview:
    """The values of a tensor in row-major order, as they lie in memory."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


class Reader(Protocol):
    """Reads tensors of a checkpoint, by key."""

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

    Attributes:
        value: what was read, or what hooks made of it; None before.
    """

    reader: Reader
    key: str
    value: Tensor | None

    @staticmethod
    def __new__(cls, reader: Reader, key: str, shape: torch.Size, dtype: torch.dtype) -> OnDisk:  # noqa: D102
        made: OnDisk = wrapper_tensor(cls, list(shape), dtype, torch.device("cpu"))
        made.reader, made.key, made.value = reader, key, None
        _made.append(weakref.ref(made))
        return made

    def once(self) -> Tensor:
        """The plain tensor, whose values are not kept."""
        return self.reader.whole(self.key) if self.value is None else self.value

    def plain(self) -> Tensor:
        """The plain tensor, whose values are kept from now on."""
        self.value = self.once()
        return self.value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OF_THE_SHAPE:
            with torch.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        # a parameter that takes the values over
        read = OnDisk.once if func is Tensor.copy_ and type(args[0]) is not OnDisk else OnDisk.plain
        args, kwargs = tree_map_only(OnDisk, read, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(OnDisk, OnDisk.plain, (args, kwargs or {}))
        return func(*args, **kwargs)


_OF_THE_SHAPE = {
    *(Tensor.__len__, Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.element_size),
    *(Tensor.is_floating_point, Tensor.is_complex),
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("is_meta", "is_sparse", "is_quantized", "is_leaf", "nbytes")),
}


def read_kept_tensors() -> None:
    """Reads what hooks kept of a restored checkpoint: the next may replace its files. Nothing is communicated."""
    kept = [tensor for made in _made if (tensor := made()) is not None]
    _made.clear()
    for tensor in kept:
        tensor.plain()


_made: list[weakref.ref[OnDisk]] = []


def in_layout_of(tree: Any, like: Callable[[Path], Any]) -> Any:
    """The tree with what is :class:`OnDisk` in it as the ranks hold it.

    Args:
        like: the tensor that what is at a path is loaded into: for a DTensor of its shape, this rank's part is read;
            for a placeholder, of another stage's, nothing. For any other it stays as it is, and is read when it is
            copied.

    Communication: where the tree has any, the verdict on what was read: an all-gather of a short string over the world.
    """
    wanted: dict[Reader, dict[str, Tensor]] = {}
    for path, value in leaves(tree):
        if type(value) is OnDisk:
            of_reader = wanted.setdefault(value.reader, {})  # all ranks ask it, whatever they want
            target = like(path)
            is_part = isinstance(target, DTensor) and target.shape == value.shape
            if value.value is None and target is not None and (is_part or is_placeholder(target)):
                of_reader.setdefault(value.key, target)
    found = {reader: reader.in_layout(likes) for reader, likes in wanted.items()}

    def put(path: Path, value: Any) -> Any:
        if type(value) is not OnDisk:
            return value
        if value.value is not None:
            return value.value
        return found.get(value.reader, {}).get(value.key, value)

    return map_leaves(tree, put)
