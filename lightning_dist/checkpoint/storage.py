"""Files that torch.distributed.checkpoint writes and reads, on the local disk or at a URL, with their checksums."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemBase
from upath import UPath

from lightning_dist.checkpoint.locations import is_remote, remote_files, remote_key

_HANDED_OVER = 1 << 24
"""Bytes after which the system is told to begin to write; else it begins when the file is flushed at its end."""


def flush(file: IO[Any]) -> None:
    """What was written to a file of the local disk survives a power failure; one at a URL is sent when it is closed."""
    file.flush()
    try:
        descriptor = file.fileno()
    except (OSError, AttributeError):
        return
    os.fsync(descriptor)


def file_system(path: Path, sums: dict[str, tuple[int, int]] | None = None) -> FileSystem:
    """The files that torch.distributed.checkpoint reads or writes.

    Args:
        path: of the directory.
        sums: filled with size and CRC-32 of each file that is written, by name.
    """
    sums = {} if sums is None else sums
    # torch's reader and writer take any FileSystemBase, whatever the type of their attribute says
    return cast(FileSystem, _RemoteFileSystem(sums)) if is_remote(path) else ChecksumFileSystem(sums)


class ChecksumFileSystem(FileSystem):
    """Files of torch.distributed.checkpoint, whose checksums are taken while they are written.

    Args:
        sums: filled with size and CRC-32 of each file, by name.
    """

    def __init__(self, sums: dict[str, tuple[int, int]]) -> None:
        self._sums = sums

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        """A stream that adds up what is written to it, in order."""
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with ChecksumStream(io.FileIO(path, mode)) as stream:
            yield cast(io.IOBase, stream)
            self._sums[Path(path).name] = stream.size, stream.sum

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Renames the file, and what is known of its checksum."""
        super().rename(path, new_path)
        if Path(path).name in self._sums:
            self._sums[Path(new_path).name] = self._sums.pop(Path(path).name)


class ChecksumStream(io.BufferedWriter):
    """A stream that adds up what is written to it.

    Attributes:
        size: in bytes.
        sum: CRC-32.
    """

    size = sum = 0
    _handed_over = 0

    def write(self, data: Any) -> int:
        """Writes as a file does, and counts."""
        self.sum = zlib.crc32(data, self.sum)
        self.size += memoryview(data).nbytes
        written = super().write(data)
        on_disk = isinstance(self.raw, io.FileIO) and hasattr(os, "posix_fadvise")
        if on_disk and self.size - self._handed_over >= _HANDED_OVER:
            self.flush()
            # Linux begins to write what it is told to forget
            os.posix_fadvise(self.fileno(), self._handed_over, self.size - self._handed_over, os.POSIX_FADV_DONTNEED)
            self._handed_over = self.size
        return written


class _RemoteFileSystem(FileSystemBase):
    """Files at a URL, whose checksums are taken while they are written."""

    def __init__(self, sums: dict[str, tuple[int, int]]) -> None:
        self._sums = sums

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[io.IOBase, None, None]:
        with path.open(mode) as file:
            if mode != "wb":
                yield file
                return
            with ChecksumStream(_LeftOpen(file)) as stream:
                yield cast(io.IOBase, stream)
            self._sums[path.name] = stream.size, stream.sum

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    def rename(self, path: Any, new_path: Any) -> None:
        remote_files(path).mv(remote_key(path), remote_key(new_path))
        if path.name in self._sums:
            self._sums[new_path.name] = self._sums.pop(path.name)

    def init_path(self, path: Any) -> Any:
        return path

    def mkdir(self, path: Any) -> None:
        path.mkdir(parents=True, exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return isinstance(checkpoint_id, UPath)

    def exists(self, path: Any) -> bool:
        return bool(path.exists())

    def rm_file(self, path: Any) -> None:
        path.unlink()

    def ls(self, path: Any) -> list[str]:
        return [str(file) for file in path.iterdir()]


class _LeftOpen(io.RawIOBase):
    """A file at a URL that another closes."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return int(self._file.write(data))

    def tell(self) -> int:
        return int(self._file.tell())
