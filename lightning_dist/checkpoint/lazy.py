"""Tensors of a checkpoint that are read when they are needed, one at a time."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lightning_dist.pytree import Path, map_leaves

_PIECE = 1 << 24

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


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
        for begin, end in self.rows(_PIECE):
            yield bytes_of(self.read_some(begin, end))


def give_back_freed_memory() -> None:
    """Makes glibc ask the system for each large block anew, and give it back when it is freed.

    By default it keeps what is freed for blocks of up to 32 MB, whose holes then fit no later tensor.
    """
    try:
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)
    except (AttributeError, OSError):
        return  # another C library


def in_memory(tree: Any, unless: Callable[[Path, LazyTensor], bool] = lambda path, lazy: False) -> Any:
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


def read_into(file: BinaryIO, memory: Tensor) -> None:
    """Fills a contiguous tensor from where the file stands.

    Raises:
        EOFError: the file has less.
    """
    # not through numpy, which leaves the storage a fixed size that _LazyPlanner of convert could not let go
    left = memoryview((ctypes.c_char * memory.nbytes).from_address(memory.data_ptr() or 1)).cast("B")
    while len(left):
        count = file.readinto(left[:_PIECE])  # type: ignore[attr-defined]
        if not count:
            raise EOFError(f"{file.name} ends {len(left)} bytes too early")
        left = left[count:]


def bytes_of(tensor: Tensor) -> memoryview:
    """The values of a tensor in row-major order, as they lie in memory."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
