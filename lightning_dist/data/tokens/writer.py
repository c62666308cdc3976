"""Writing a store: shard after shard, and a journal by which a writer that was killed goes on.

[Note: a killed writer]
A shard is written under other names, and gets its own when it is on the disk. Then a line in the journal says that it
is there, and which part of the sources comes after it. Whoever goes on throws away what no line tells of, and encodes
from that part on, so the shards are those of a writer that was never killed. The index is written last; a directory
without one is not whole, and one with an index is.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from lightning_dist.checkpoint.checksums import ChecksumStream
from lightning_dist.checkpoint.locations import flush
from lightning_dist.data.tokens.encode import Encoded, EncodedPart
from lightning_dist.data.tokens.format import (
    DOCUMENTS,
    INCOMPLETE,
    OFFSET,
    TOKENS,
    Shard,
    StoreIndex,
    flush_folder,
    lost_part,
    shard_name,
)

JOURNAL = "unfinished.jsonl"


@dataclass(frozen=True)
class Place:
    """In the sources: after so many pieces, and so many documents of the next."""

    pieces: int = 0
    documents: int = 0


class ShardWriter:
    """The shard that is being written.

    Args:
        folder: of the store.
        number: of the shard.
        dtype: of tokens on the disk.
    """

    def __init__(self, folder: Path, number: int, dtype: np.dtype) -> None:
        self._folder, self._name, self._dtype = folder, shard_name(number), dtype
        self._stream = self._open(TOKENS)
        self._lengths: list[np.ndarray] = []
        self.num_tokens = 0

    def _open(self, end: str) -> ChecksumStream:
        return ChecksumStream(io.FileIO(self._folder / (self._name + end + INCOMPLETE), "w"))

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Documents of these lengths, whose tokens follow each other."""
        self._stream.write(np.ascontiguousarray(tokens, self._dtype).data)
        self._lengths.append(lengths)
        self.num_tokens += len(tokens)

    def finish(self) -> Shard:
        """Puts the shard on the disk, and then under its name."""
        offsets = np.cumsum(np.concatenate([[0], *self._lengths]), dtype=OFFSET)
        documents = self._open(DOCUMENTS)
        documents.write(offsets.data)
        for stream in (self._stream, documents):
            flush(stream)
            stream.close()
        for end in (TOKENS, DOCUMENTS):
            path = self._folder / (self._name + end)
            os.replace(path.with_name(path.name + INCOMPLETE), path)
        flush_folder(self._folder)
        return Shard(self._name, self.num_tokens, len(offsets) - 1, self._stream.sum, documents.sum)

    def close(self) -> None:
        """Leaves it as it is."""
        self._stream.close()


class Journal:
    """The shards of an unfinished store, and the place in the sources after the last of them.

    Args:
        file: open to read and append, and locked.
        settings: see :class:`~lightning_dist.data.tokens.format.StoreIndex`; one that is new begins with them.

    Raises:
        ValueError: the first line can't be read. What comes after another that can't is forgotten.
    """

    def __init__(self, file: IO[bytes], settings: dict[str, Any]) -> None:
        self._file = file
        self.shards: list[Shard] = []
        self._places = [Place()]
        file.seek(0)
        lines = file.read().split(b"\n")[:-1]  # a line that was being written has no end
        self.settings = _first_entry(lines[0], file.name) if lines else settings
        self._ends = [len(lines[0]) + 1] if lines else []
        for line in lines[1:]:
            try:
                entry = json.loads(line)
                shard, following = Shard(**entry["shard"]), Place(**entry["next"])
            except (ValueError, KeyError, TypeError):
                break
            self._remember(shard, following, self._ends[-1] + len(line) + 1)
        file.truncate(self._ends[-1] if lines else 0)
        if not lines:
            self._ends.append(self._append(settings))

    @property
    def place(self) -> Place:
        """In the sources, after the last shard."""
        return self._places[-1]

    def _remember(self, shard: Shard, following: Place, end: int) -> None:
        self.shards.append(shard)
        self._places.append(following)
        self._ends.append(end)

    def add(self, shard: Shard, following: Place) -> None:
        """A shard is on the disk, and the sources go on at a place."""
        self._remember(shard, following, self._append({"shard": asdict(shard), "next": asdict(following)}))

    def _append(self, entry: dict[str, Any]) -> int:
        """Returns where the line ends."""
        self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(entry).encode() + b"\n")
        flush(self._file)
        return self._file.tell()

    def end_at_first_lost(self, folder: Path, index: StoreIndex) -> None:
        """Forgets the first shard whose files are not there, or not of their size, and those after it.

        Args:
            index: of any shards, whose files have sizes as these.
        """
        for number, shard in enumerate(self.shards):
            if lost_part(folder, index.files(shard)):
                self._file.truncate(self._ends[number])
                del self.shards[number:], self._places[number + 1 :], self._ends[number + 1 :]
                return

    def remove_others(self, folder: Path) -> None:
        """Removes shards that it does not tell of, and halves of them."""
        known = {shard.name for shard in self.shards}
        for path in folder.iterdir():
            is_shard = path.suffix in (TOKENS, DOCUMENTS) and path.stem not in known
            if path.name.endswith(INCOMPLETE) or is_shard:
                path.unlink()


def _first_entry(line: bytes, name: str) -> dict[str, Any]:
    try:
        settings = json.loads(line)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(
            f"{name} can't be read, so where its store goes on is not known; remove the directory to begin anew"
        )
    return settings


@contextmanager
def locked(folder: Path) -> Iterator[IO[bytes]]:
    """The journal of a folder, which no other process holds.

    Raises:
        ValueError: another process writes there, or the file system has no locks.
    """
    import fcntl  # not on every system, and readers need none

    with (folder / JOURNAL).open("a+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: workers do not inherit it
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another process is writing {folder}; wait for it, or name another directory") from None
        except OSError as error:
            raise ValueError(
                f"{folder} lies on a file system that gives no locks ({error.strerror}), so that two writers could mix "
                "their shards; name a directory on another, and move the store there when it is whole"
            ) from error
        yield file


@dataclass
class _LongDocument:
    """One that comes in parts: the piece of its first, tokens that wait for a shard, and the number of all."""

    piece: int
    waiting: list[np.ndarray] = field(default_factory=list)
    num_tokens: int = 0
    has_shard: bool = False


class ShardsWriter:
    """Cuts the stream of documents into shards of at most so many tokens; a longer document is a shard of its own.

    Args:
        folder: of the store.
        journal: where it goes on from.
        dtype: of tokens on the disk.
        shard_tokens: of a shard at most.
    """

    def __init__(self, folder: Path, journal: Journal, dtype: np.dtype, shard_tokens: int) -> None:
        self._folder, self._journal, self._dtype, self._most = folder, journal, dtype, shard_tokens
        self._shard: ShardWriter | None = None
        self._long: _LongDocument | None = None

    def add(self, part: Encoded, piece: int, skip: int = 0) -> None:
        """The documents of the piece of this number, without the first so many."""
        ends = np.cumsum(part.lengths)
        first = skip
        while first < len(part.lengths):
            begin = int(ends[first - 1]) if first else 0
            room = self._most - (self._shard.num_tokens if self._shard else 0)
            last = int(np.searchsorted(ends, begin + room, side="right"))
            if last <= first and self._shard:  # less where the shard is one document of more than a shard's tokens
                self._finish(Place(piece, first))
                continue
            last = max(last, first + 1)
            self._open().add(part.tokens[begin : int(ends[last - 1])], part.lengths[first:last])
            first = last

    def add_part(self, part: EncodedPart, piece: int) -> None:
        """The piece of this number, of a document in parts. It waits as long as it may fit into the shard that is being
        written; when it does not, it goes to the next as it comes, which is its alone if it is longer than a shard.
        """
        if self._long is None:
            self._long = _LongDocument(piece)
        long, is_last = self._long, part.end is not None
        long.waiting.append(part.tokens)
        long.num_tokens += len(part.tokens)
        if part.end is not None and long.num_tokens:
            long.waiting.append(part.end)
            long.num_tokens += len(part.end)
        if self._shard and not long.has_shard and self._shard.num_tokens + long.num_tokens > self._most:
            self._finish(Place(long.piece))
        if long.num_tokens and (is_last or long.has_shard or self._shard is None):
            for tokens in long.waiting:
                self._open().add(tokens, np.empty(0, np.int64))
            long.waiting, long.has_shard = [], True
        if is_last:
            if long.num_tokens:
                self._open().add(part.tokens[:0], np.array([long.num_tokens]))
            self._long = None

    def _open(self) -> ShardWriter:
        """The shard that is being written."""
        if self._shard is None:
            self._shard = ShardWriter(self._folder, len(self._journal.shards), self._dtype)
        return self._shard

    def finish(self, num_pieces: int) -> None:
        """The last document was added."""
        if self._shard:
            self._finish(Place(num_pieces))

    def _finish(self, following: Place) -> None:
        assert self._shard is not None
        shard, self._shard = self._shard.finish(), None
        self._journal.add(shard, following)

    def close(self) -> None:
        """Leaves what is not finished."""
        if self._shard:
            self._shard.close()
