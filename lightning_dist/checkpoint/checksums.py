"""Checksums of the files of a checkpoint, so that a damaged one is named before any of it is used."""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from lightning_dist.collectives import raised_on_all_ranks

CHECKSUMS = "checksums.json"
"""Of a directory: size in bytes and CRC-32 of each file, by name."""

_CHUNK = 1 << 22

_HANDED_OVER = 1 << 24
"""Bytes after which the system is told to begin to write; else it begins when the file is flushed at its end."""


UNRELATED = (PermissionError, ConnectionError, TimeoutError, MemoryError, ImportError, torch.OutOfMemoryError)
"""Errors that say nothing of the checkpoint that is read."""


@raised_on_all_ranks
class DamagedCheckpoint(ValueError):
    """A checkpoint that lacks a part, or whose bytes are not those that were written."""


def flush(file: IO[Any]) -> None:
    """What was written to a file of the local disk survives a power failure; one at a URL is sent when it is closed."""
    file.flush()
    try:
        descriptor = file.fileno()
    except (OSError, AttributeError):
        return
    os.fsync(descriptor)


class SummingFileSystem(FileSystem):
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
        with Summing(io.FileIO(path, mode)) as stream:
            yield cast(io.IOBase, stream)
            self._sums[Path(path).name] = stream.size, stream.sum

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Also of the file's checksum."""
        super().rename(path, new_path)
        if Path(path).name in self._sums:
            self._sums[Path(new_path).name] = self._sums.pop(Path(path).name)


class Summing(io.BufferedWriter):
    """A stream that adds up what is written to it.

    Attributes:
        size: in bytes.
        sum: CRC-32.
    """

    size = sum = 0
    _handed_over = 0

    def write(self, data: Any) -> int:
        """As of a file."""
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


def of_file(path: Path) -> tuple[int, int]:
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
    """Compares this rank's share of a directory's files with their checksums; one without any, as Lightning's, is taken
    as it is.

    Args:
        folder: of the checkpoint.
        names: of the files that it needs.
        rank: of those that share the work.
        num_ranks: how many there are.

    Raises:
        DamagedCheckpoint: a file is not what was written.
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
        found = of_file(folder / name)
        if found != sums[name]:
            raise DamagedCheckpoint(
                f"checkpoint {folder} is damaged: its part {name} has {found[0]} bytes with CRC-32 {found[1]:08x}, "
                f"and {sums[name][0]} bytes with {sums[name][1]:08x} were written"
            )


def verify_file(path: Path, rank: int, num_ranks: int) -> None:
    """Compares this rank's share of a single file's records with the checksums that ``torch.save`` wrote into it.

    Raises:
        DamagedCheckpoint: a record is not what was written. Nothing for a file of torch's older format.
    """
    if not zipfile.is_zipfile(path):
        return
    refuse_compressed(path)
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


def refuse_compressed(path: Path) -> None:
    """Compressed records ask for much more memory than the file has bytes; ``torch.save`` writes none.

    Raises:
        DamagedCheckpoint: there is one, or the file's list of records can't be read.
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
