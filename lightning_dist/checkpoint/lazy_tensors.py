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

PIECE = 1 << 24
"""Bytes that are read at once of a tensor whose rows can be read alone."""


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor that lies in a file. One object that is under two names is one tensor, tied.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        read: makes the plain tensor, in host memory.
        read_rows: makes a part of it, from one index of its first dim to another; None where that costs as much as all
            of it.
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
        """Begin and end of rows that have at most so many bytes together, if one has no more; of all rows where they
        can't be read alone, and of no dim one.
        """
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


def give_back_freed_memory() -> None:
    """Makes glibc give the system the pages that are free between what is in use: it keeps those of blocks of up to
    32 MB, whose holes then fit no later tensor. Nothing of the process is set.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return  # another C library


def read_lazy(tree: Any, unless: Callable[[Path, LazyTensor], bool] = lambda path, lazy: False) -> Any:
    """The tree with its lazy tensors read.

    Args:
        tree: nested containers.
        unless: of a path and what is there: whether that one stays in its file.
    """
    read: dict[int, Tensor] = {}

    def load(path: Path, value: Any) -> Any:
        if not isinstance(value, LazyTensor) or unless(path, value):
            return value
        if id(value) not in read:
            read[id(value)] = value.read()
        return read[id(value)]

    return map_leaves(tree, load)


def read_into(file: IO[bytes], memory: Tensor) -> None:
    """Fills a contiguous tensor from where the file stands.

    Raises:
        EOFError: the file has less.
    """
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
        shape: of the tensor.
        dtype: of the tensor.
    """

    reader: Reader
    key: str
    value: Tensor | None
    """What was read, or what hooks made of it; None before."""

    @staticmethod
    def __new__(cls, reader: Reader, key: str, shape: torch.Size, dtype: torch.dtype) -> OnDisk:  # noqa: D102
        made: OnDisk = wrapper_tensor(cls, list(shape), dtype, torch.device("cpu"))
        made.reader, made.key, made.value = reader, key, None
        _made.append(weakref.ref(made))
        return made

    def plain(self) -> Tensor:
        """The plain tensor, whose values are kept from now on."""
        if self.value is None:
            self.value = self.reader.whole(self.key)
        return self.value

    def once(self) -> Tensor:
        """The plain tensor, whose values are not kept."""
        return self.reader.whole(self.key) if self.value is None else self.value

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


def read_kept_tensors() -> None:
    """Reads what hooks have kept of a checkpoint that has been restored: the next may replace its files.

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
