"""A directory of copies that the processes of a machine share, bounded in bytes.

fsspec has caches of its own; none of them bounds what it keeps, or makes processes wait for each other's downloads.

[Note: a copy that is removed while it is read]
What was used least recently is removed to make room, by whichever process needs it. Whoever has the file open goes on
reading it, as POSIX has it: its bytes stay on the disk, uncounted, until the last one closes it. So nobody asks whether
a copy is there and opens it later; :meth:`ShardCache.open` does both, and makes the copy anew where it has gone.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

from filelock import FileLock, Timeout

from lightning_dist.checkpoint.locations import flush

T = TypeVar("T")

ENVIRONMENT = "LIGHTNING_DIST_CACHE"
"""The variable that names the directory of caches."""

_INCOMPLETE = ".incomplete"
_STRIPES = 256
_WAIT = 0.1
"""Seconds until a process looks again whether others have finished what holds the room."""


class ShardCache:
    """Files by name, made when they are asked for; together they have at most so many bytes.

    Safe for any number of processes and threads of one machine: a file is made once, appears whole, and counts from the
    moment that it is begun. It can be sent to other processes.

    Args:
        folder: by default ``shards`` below ``$LIGHTNING_DIST_CACHE``, or ``~/.cache/lightning_dist``.
        max_bytes: of all files together.

    Raises:
        ValueError: a bound that is not positive.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, max_bytes: float = 64e9) -> None:
        if folder is None:
            folder = Path(os.environ.get(ENVIRONMENT, "~/.cache/lightning_dist")) / "shards"
        self.folder, self.max_bytes = Path(folder).expanduser(), int(max_bytes)
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes} of a cache must be at least 1")

    def __contains__(self, name: str) -> bool:
        return (self.folder / name).exists()

    def open(self, name: str, num_bytes: int, make: Callable[[IO[bytes]], None], opener: Callable[[Path], T]) -> T:
        """What ``opener`` makes of the file's path, while it is there.

        Args:
            name: of the file, with no slash.
            num_bytes: it will have, or about.
            make: writes it, where it is not there; once on this machine, the other processes wait.
            opener: opens it; see [Note: a copy that is removed while it is read].

        Raises:
            PermissionError: the cache can't be written.
            ValueError: it is larger than the cache.
        """
        while True:
            with suppress(FileNotFoundError):
                return self.get(name, opener)
            with self._lock(name):
                if name not in self:
                    self._make(self.folder / name, num_bytes, make)

    def get(self, name: str, opener: Callable[[Path], T]) -> T:
        """What ``opener`` makes of the file's path; a FileNotFoundError where it is not there."""
        path = self.folder / name
        try:
            os.utime(path)  # it is the one that was used last
        except PermissionError as error:
            raise self._no_rights(error) from error
        return opener(path)

    def add(self, name: str, num_bytes: int, make: Callable[[IO[bytes]], None]) -> bool:
        """Makes a file for later; False where it is there, or another process is at it."""
        lock = self._lock(name)
        try:
            with lock.acquire(timeout=0):
                if (self.folder / name).exists():
                    return False
                self._make(self.folder / name, num_bytes, make)
                return True
        except Timeout:
            return False

    def remove(self, name: str) -> None:
        """Of a file that is not needed any more."""
        with suppress(OSError):
            (self.folder / name).unlink()

    def num_bytes(self) -> int:
        """Of all files now, those that are being made too."""
        return sum(size for _, size, _ in self._files())

    def _make(self, path: Path, num_bytes: int, make: Callable[[IO[bytes]], None]) -> None:
        incomplete = path.with_name(path.name + _INCOMPLETE)
        try:
            self._reserve(incomplete, num_bytes)
            with incomplete.open("r+b") as file:
                make(file)
                file.truncate()
                flush(file)
                size = file.tell()
            if size > num_bytes:  # it was told about; what others make now may be above the bound for a while
                with FileLock(self.folder / ".locks" / "room"):
                    self._make_room(incomplete, size)
            os.replace(incomplete, path)
        except BaseException:
            self.remove(incomplete.name)
            raise

    def _reserve(self, incomplete: Path, num_bytes: int) -> None:
        """Makes room for a file, which counts from now on."""
        if num_bytes > self.max_bytes:
            raise ValueError(
                f"{incomplete.name.removesuffix(_INCOMPLETE)} has {num_bytes:,} bytes, and the cache {self.folder} may "
                f"have {self.max_bytes:,}; give it room for all shards that are read at a time (max_bytes=)"
            )
        while True:
            with FileLock(self.folder / ".locks" / "room"):
                if self._make_room(incomplete, num_bytes):
                    with incomplete.open("ab") as file:
                        file.truncate(num_bytes)
                    return
            time.sleep(_WAIT)  # others make files now, which can be removed when they are whole

    def _make_room(self, incomplete: Path, num_bytes: int) -> bool:
        files = [file for file in self._files() if file[2] != incomplete]
        total = sum(size for _, size, _ in files) + num_bytes
        for _, size, path in sorted(files):
            if total <= self.max_bytes:
                break
            if path.name.endswith(_INCOMPLETE) and not self._is_abandoned(path, incomplete):
                continue
            with suppress(OSError):  # an open file can't be removed on Windows
                path.unlink()
                total -= size
        return total <= self.max_bytes

    def _is_abandoned(self, incomplete: Path, own: Path) -> bool:
        """Whether the process that made a file was killed; this one holds the lock of its own."""
        lock = self._lock(incomplete.name.removesuffix(_INCOMPLETE))
        if lock.lock_file == self._lock(own.name.removesuffix(_INCOMPLETE)).lock_file:
            return True
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        lock.release()
        return True

    def _no_rights(self, error: OSError) -> PermissionError:
        return PermissionError(
            f"the cache {self.folder} can't be written ({error.strerror}); name a directory of your own by "
            f"ShardCache(folder) or {ENVIRONMENT}"
        )

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of the last use, bytes, and path of each."""
        found = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if entry.is_file():
                    stat = entry.stat()
                    found.append((stat.st_mtime, stat.st_size, Path(entry.path)))
        return found

    def _lock(self, name: str) -> FileLock:
        """Of a file, and some others: there are not as many locks as files."""
        try:
            (self.folder / ".locks").mkdir(parents=True, exist_ok=True)
        except PermissionError as error:
            raise self._no_rights(error) from error
        stripe = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % _STRIPES
        return FileLock(self.folder / ".locks" / f"{stripe:03d}")
