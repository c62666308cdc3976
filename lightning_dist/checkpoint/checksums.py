"""Checksums of the files of a checkpoint, compared before any rank reads, so that a damaged one is named first."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from lightning_dist.checkpoint.formats import CHECKSUMS, DamagedCheckpoint
from lightning_dist.checkpoint.storage import flush

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
        found = checksum_of(folder / name)
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
