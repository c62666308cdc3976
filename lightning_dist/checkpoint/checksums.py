"""Checksums of a checkpoint's files: taken while they are written, compared before any rank reads."""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from lightning_dist.checkpoint.locations import CHECKSUMS, DamagedCheckpoint, flush, is_remote

_HANDED_OVER = 1 << 24
"""Bytes after which the system is told to begin to write; else it begins when the file is flushed at its end."""

_CHUNK = 1 << 22

UNRELATED = (PermissionError, ConnectionError, TimeoutError, MemoryError, ImportError, torch.OutOfMemoryError)
"""Errors that say nothing of the checkpoint that is read."""


def checksum_of(path: Path) -> tuple[int, int]:
    """Size in bytes, and CRC-32."""
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return size, crc


def write_checksums(sums: Mapping[str, tuple[int, int]], folder: Path) -> None:
    """Writes them beside the files, flushed to the disk."""
    with (folder / CHECKSUMS).open("w") as file:
        json.dump({name: {"bytes": size, "crc32": crc} for name, (size, crc) in sorted(sums.items())}, file, indent=1)
        flush(file)


def verify_directory(folder: Path, names: Iterable[str], rank: int, num_ranks: int) -> None:
    """Compares this rank's share of the named files of a directory with their checksums; one without any, as
    Lightning's, is taken as it is. Raises DamagedCheckpoint where a file is not what was written.
    """
    try:
        recorded = json.loads((folder / CHECKSUMS).read_text())
        sums = {name: (int(entry["bytes"]), int(entry["crc32"])) for name, entry in recorded.items()}
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {CHECKSUMS} can't be read ({error})") from error
    needed = sorted(names)
    if unknown := [name for name in needed if name not in sums]:
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {CHECKSUMS} does not know its part {unknown[0]}")
    for name in needed[rank::num_ranks]:
        found = checksum_of(folder / name)
        if found != sums[name]:
            raise DamagedCheckpoint(
                f"checkpoint {folder} is damaged: its part {name} has {found[0]} bytes with CRC-32 {found[1]:08x}, "
                f"and {sums[name][0]} bytes with {sums[name][1]:08x} were written"
            )


def verify_file(path: Path, rank: int, num_ranks: int) -> None:
    """Compares this rank's share of a single file's records with the checksums that ``torch.save`` wrote into it, and
    raises DamagedCheckpoint where one differs; nothing for a file of torch's older format.
    """
    if not zipfile.is_zipfile(path):
        return
    validate_uncompressed(path)
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist()[rank::num_ranks]:
            try:
                with archive.open(record) as file:
                    while file.read(_CHUNK):
                        pass
            except UNRELATED:
                raise
            except Exception as error:  # what zipfile raises for a damaged header is of many kinds
                raise DamagedCheckpoint(
                    f"checkpoint {path} is damaged: its record {record.filename!r} fails its checksum ({error})"
                ) from error


def validate_uncompressed(path: Path) -> None:
    """Raises DamagedCheckpoint for compressed records, which ask for much more memory than the file has bytes and which
    ``torch.save`` never writes, and for a list of records that can't be read.
    """
    with path.open("rb") as file:
        try:
            records = zipfile.ZipFile(file).infolist()
        except UNRELATED:
            raise
        except Exception as error:
            raise DamagedCheckpoint(f"{path} is no checkpoint, or a damaged one: {error}") from error
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED:
            raise DamagedCheckpoint(f"{path} is refused: its record {record.filename!r} is compressed")


class _AnyPath(FileSystem):
    """Torch's files with paths as :func:`as_path` gives them: torch itself would take one at a URL for a local one."""

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    def mkdir(self, path: Any) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def exists(self, path: Any) -> bool:
        return bool(path.exists())

    def rm_file(self, path: Any) -> None:
        path.unlink()


class ChecksumFileSystem(_AnyPath):
    """Files that torch.distributed.checkpoint writes or reads, on the local disk or at a URL. The sums are filled with
    size and CRC-32 of each file that is written, by name.
    """

    def __init__(self, sums: dict[str, tuple[int, int]] | None = None) -> None:
        self._sums = {} if sums is None else sums

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[io.IOBase, None, None]:
        """A stream that adds up what is written to it, in order."""
        if mode != "wb":
            with path.open(mode) as file:
                yield file
            return
        with ExitStack() as stack:
            raw = _LeftOpen(stack.enter_context(path.open(mode))) if is_remote(path) else io.FileIO(path, mode)
            stream = stack.enter_context(ChecksumStream(raw))
            yield cast(io.IOBase, stream)
            self._sums[path.name] = stream.size, stream.sum

    def rename(self, path: Any, new_path: Any) -> None:
        """Renames the file, and what is known of its checksum."""
        if is_remote(path):
            path.fs.mv(path.path, new_path.path)
        else:
            path.rename(new_path)
        if path.name in self._sums:
            self._sums[new_path.name] = self._sums.pop(path.name)


class ChecksumStream(io.BufferedWriter):
    """A stream that adds up what is written to it: its ``size`` in bytes, and its ``sum``, a CRC-32."""

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


class _LeftOpen(io.RawIOBase):
    """A file at a URL that another closes, once."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return int(self._file.write(data))

    def tell(self) -> int:
        return int(self._file.tell())
