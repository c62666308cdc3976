"""One rank's part of a snapshot, in a file in memory that outlives the rank.

    header      one page: step, fit, whose part it is, where the rest lies, checksums; written last
    tensors     one after the other, each where its table says
    table       pickled: the tensors, and where they belong
    small       pickled: all that is no tensor

[Note: a slot is whole, or no slot]
A rank has two slots and writes them in turn. The header is taken away before anything else is written, and put there
when all else is. A rank that is killed in between leaves a slot without a header, and the one before whole.
"""

from __future__ import annotations

import json
import mmap
import os
import pickle
import struct
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PAGE = 4096
_MAGIC = b"lightning_dist snapshot 1"
_BLOCK = 4096
"""Words of 8 bytes that are summed up before the CRC is taken."""


PIECE = 1 << 28
"""Bytes of a slot that are sent at once."""


class NoRoom(OSError):
    """There is no memory for a slot."""


@dataclass(frozen=True)
class Header:
    """What a slot says of itself.

    Args:
        fit: which fit of its script, and of which module.
        order: number of the attempt, and of the snapshot in it: what is later counts, also where training went back.
        step: optimizer steps that were done.
        batches: that were seen by then, of all epochs.
        time: when it was written, in seconds since the epoch.
        rank: whose part it is.
        arrangement: the layout, and on which node each rank was.
        num_ranks: that wrote parts of this snapshot.
        place: what its rank holds of the state; replicas hold the same.
        num_places: different ones.
        holders: ranks of its node whose parts together have all of that.
        tensors, table, small: bytes of each.
        checksum: of the three.
    """

    fit: str
    order: tuple[int, int]
    step: int
    batches: int
    time: float
    rank: int
    arrangement: str
    num_ranks: int
    place: str
    num_places: int
    holders: tuple[int, ...]
    tensors: int
    table: int
    small: int
    checksum: int = 0

    @property
    def nbytes(self) -> int:
        """Of the slot's content, with the header."""
        return PAGE + self.tensors + self.table + self.small

    def packed(self) -> bytes:
        """A page, with its own checksum."""
        content = json.dumps(asdict(self)).encode()
        page = _MAGIC + struct.pack("<II", len(content), zlib.crc32(content)) + content
        assert len(page) <= PAGE, "a header is one page"
        return page.ljust(PAGE, b"\0")

    @staticmethod
    def unpacked(page: bytes) -> Header | None:
        """None where there is none, or not all of it."""
        start = len(_MAGIC) + 8
        if len(page) < PAGE or not page.startswith(_MAGIC):
            return None
        length, crc = struct.unpack("<II", page[len(_MAGIC) : start])
        content = page[start : start + length]
        if zlib.crc32(content) != crc:
            return None
        values = json.loads(content)
        return Header(**{**values, "order": tuple(values["order"]), "holders": tuple(values["holders"])})


class Slot:
    """A file in memory, mapped, to write one part after the other into.

    Attributes:
        memory: its bytes after the header, to write tensors to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        self.memory = torch.empty(0, dtype=torch.uint8)

    def open(self, nbytes: int) -> None:
        """Takes the header away, and gets memory for so many bytes beside it; a :class:`NoRoom` where there is none."""
        if self._map is not None and len(self._map) >= PAGE + nbytes:
            self._map[:PAGE] = bytes(PAGE)
            return
        self.remove()
        size = PAGE + nbytes + nbytes // 16
        try:
            with self.path.open("w+b") as file:
                reserve(file.fileno(), size)
                self._map = mmap.mmap(file.fileno(), size)
        except OSError as error:
            self.remove()
            raise NoRoom(f"{self.path.parent} has no room for {size / 2**20:.0f} MiB: {error}") from error
        self.memory = torch.frombuffer(self._map, dtype=torch.uint8, offset=PAGE)

    def put(self, offset: int, content: bytes) -> None:
        """Writes bytes after the header."""
        assert self._map is not None
        self._map[PAGE + offset : PAGE + offset + len(content)] = content

    def checksum(self, header: Header) -> int:
        """Of what is written by now."""
        return _checksum(self.memory.numpy()[: header.nbytes - PAGE], header)

    def commit(self, header: Header) -> None:
        """The slot is whole."""
        assert self._map is not None
        self._map[:PAGE] = header.packed()

    def whole(self, header: Header) -> tuple[Tensor, Tensor]:
        """The header, and what follows it, as bytes."""
        assert self._map is not None
        page = torch.frombuffer(bytearray(self._map[:PAGE]), dtype=torch.uint8)
        return page, self.memory[: header.nbytes - PAGE]

    def remove(self) -> None:
        """Gives the memory back, once nobody looks at it."""
        self._map, self.memory = None, torch.empty(0, dtype=torch.uint8)
        self.path.unlink(missing_ok=True)


def reserve(descriptor: int, size: int) -> None:
    """Gets memory for a file, or raises an OSError: what is mapped and is not there ends the process that writes it."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


def _checksum(content: np.ndarray[Any, Any], header: Header) -> int:
    """CRC-32 of the small parts, and of sums of the tensors' words, block by block: each is a sum over so many words
    modulo 2**64, which any byte that is another one changes. It runs at the speed of memory, CRC-32 alone at a fifth.
    """
    words = content[: header.tensors].view(np.int64)
    whole = len(words) - len(words) % _BLOCK
    crc = zlib.crc32(words[:whole].reshape(-1, _BLOCK).sum(axis=1).data)
    crc = zlib.crc32(words[whole:].data, crc)
    return zlib.crc32(content[header.tensors :].data, crc)


@dataclass(frozen=True)
class Part:
    """A part that was read: its header, its table, what of it is no tensor; its tensors are mapped."""

    header: Header
    table: Any
    small: Any
    memory: Tensor


def read_header(path: Path) -> Header | None:
    """What a slot says of itself; None where it is not whole, or not there."""
    try:
        with path.open("rb") as file:
            return Header.unpacked(file.read(PAGE))
    except FileNotFoundError:
        return None


def two_slots(folder: Path, name: str, kept: tuple[int, int] | None) -> list[Slot]:
    """Of a rank, in the order in which they are to be written: that which has what the fit goes on from comes last."""

    def order(path: Path) -> tuple[bool, tuple[int, int]]:
        header = read_header(path)
        found = (-1, -1) if header is None else header.order
        return found == kept, found

    return [Slot(path) for path in sorted((folder / f"{name}.{number}" for number in (0, 1)), key=order)]


def is_intact(path: Path) -> bool:
    """Whether the bytes of a slot are those that were written."""
    header = read_header(path)
    if header is None or path.stat().st_size < header.nbytes:
        return False
    return _checksum(_mapped(path).numpy()[PAGE : header.nbytes], header) == header.checksum


def read_part(path: Path) -> Part:
    """A slot, as :func:`is_intact` found it. What is pickled in it was written by this run."""
    header = read_header(path)
    assert header is not None
    memory = _mapped(path)[PAGE : header.nbytes]
    content = memory.numpy()
    end = header.tensors + header.table
    table, small = pickle.loads(content[header.tensors : end].tobytes()), pickle.loads(content[end:].tobytes())
    return Part(header, table, small, memory[: header.tensors])


def _mapped(path: Path) -> Tensor:
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
