"""TokenStore: the tokens of a store as one stream, of which any part is read when it is asked for."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from lightning_dist.data.tokens.format import (
    DOCUMENTS,
    INDEX,
    OFFSET,
    TOKENIZER,
    TOKENS,
    DamagedStore,
    read_index,
)

_NEAR = 512
"""Offsets of documents that are read at once."""


class TokenStore:
    """The tokens of all shards, one after the other, as ``lightning-dist tokenize`` wrote them.

    Opening reads the index alone. What is read is not kept, and not mapped either (mapped pages would count as memory
    of the process): the operating system caches it as any file. It can be sent to other processes.

    Args:
        path: the directory.

    Raises:
        FileNotFoundError, DamagedStore, ValueError: see :func:`~lightning_dist.data.tokens.format.read_index`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self.index = read_index(self.path)
        self.dtype, self.vocab_size = np.dtype(self.index.dtype), self.index.vocab_size
        self._starts = np.cumsum([0, *(shard.num_tokens for shard in self.index.shards)])
        self._files = _OpenFiles(self.path)

    def __len__(self) -> int:
        """Tokens of all shards."""
        return int(self._starts[-1])

    @property
    def tokenizer_file(self) -> Path:
        """For ``tokenizers.Tokenizer.from_file``."""
        return self.path / TOKENIZER

    @property
    def tokenizer_digest(self) -> str:
        """SHA-256 of the tokenizer's file."""
        return str(self.index.settings["tokenizer"])

    def __getitem__(self, part: slice) -> np.ndarray:
        """Tokens ``[start:stop]`` of the stream, ``(n,)`` of the store's dtype; a DamagedStore where they are not all
        there. What the tokens are is not checked; ``lightning-dist data check`` does.

        Raises:
            TypeError: one token is asked for, which would be read alone.
        """
        if not isinstance(part, slice):
            raise TypeError(
                f"a token store is read in runs, not by {part!r}; take [start:stop], as [0:1] for the first"
            )
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"a token store is read in runs; take [{start}:{stop}] and then every {step}th")
        parts = [self._tokens(*piece) for piece in self._pieces(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, self.dtype)])

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Where documents begin in the stream, from ``start`` to below ``stop``, ``(n,)`` int64."""
        parts = [np.empty(0, np.int64)]
        for shard, first, last in self._pieces(start, stop):
            parts.append(self._starts[shard] + self._offsets(shard, first, last))
        return np.concatenate(parts)

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """The shards of a part of the stream, and from where to where it lies in each."""
        pieces: list[tuple[int, int, int]] = []
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            begin, end = int(self._starts[shard]), int(self._starts[shard + 1])
            if start < end:  # a shard may be empty
                pieces.append((shard, start - begin, min(stop, end) - begin))
            start, shard = max(start, end), shard + 1
        return pieces

    def _tokens(self, shard: int, start: int, stop: int) -> np.ndarray:
        tokens = self._files.read(self.index.shards[shard].name + TOKENS, self.index.token_type, start, stop)
        return tokens.astype(self.dtype, copy=False)

    def _offsets(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Those of a shard's documents that begin within a part of it."""
        name, low, high = self.index.shards[shard].name + DOCUMENTS, 0, self.index.shards[shard].num_documents
        while high - low > _NEAR:
            middle = (low + high) // 2
            if self._files.read(name, OFFSET, middle, middle + 1)[0] < start:
                low = middle + 1
            else:
                high = middle
        found, count = [np.empty(0, OFFSET)], self.index.shards[shard].num_documents
        while low < count:
            offsets = self._files.read(name, OFFSET, low, min(low + _NEAR, count))
            found.append(offsets[(offsets >= start) & (offsets < stop)])
            low += len(offsets)
            if offsets[-1] >= stop:
                break
        return np.concatenate(found)


class _OpenFiles:
    """Files of a folder, of which some stay open; reading moves no place in them, so processes may share them.

    Args:
        limit: files that are open at most.
    """

    def __init__(self, folder: Path, limit: int = 64) -> None:
        self._folder, self._limit = folder, limit
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, name: str, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
        """Items ``[start:stop]`` of a file of them."""
        size = (stop - start) * dtype.itemsize
        data = os.pread(self._file(name), size, start * dtype.itemsize)
        while 0 < len(data) < size and (
            more := os.pread(self._file(name), size - len(data), start * dtype.itemsize + len(data))
        ):
            data += more
        if len(data) < size:
            raise DamagedStore(
                f"token store {self._folder} is damaged: {name} ends before what {INDEX} says; "
                f"run `lightning-dist data check {self._folder}`"
            )
        return np.frombuffer(data, dtype)

    def _file(self, name: str) -> int:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        if len(self._open) >= self._limit:
            os.close(self._open.popitem(last=False)[1])
        try:
            self._open[name] = os.open(self._folder / name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"token store {self._folder} is damaged: {name} is missing; run `lightning-dist data check "
                f"{self._folder}`"
            ) from None
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict()}

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)
