"""Where a checkpoint lies, on the local disk or at a URL as ``s3://bucket/run/last.ckpt``, which format it has there,
and how it gets its name: when it is complete, and not before. URLs are universal_pathlib's.

[Note: complete or not, at an object store]
A store has no rename that takes one moment, but an object appears whole. So a directory is complete when index and
checksums are there, which are written last; the index is copied last and removed first. One that replaces another is
written beside it and then copied under its name; until that copy is complete, readers take the one beside
(:func:`resolve_swap`). A filesystem whose files appear before they are whole, as by sftp, gives this for directories
only.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, cast

from upath import UPath

from lightning_dist.collectives import raised_on_all_ranks

Format = Literal["single", "sharded", "weights"]

REST = "meta.pt"
"""What a sharded checkpoint holds beside its tensors; Lightning's strategies use the same name."""

METADATA = ".metadata"
"""The index of torch.distributed.checkpoint: which part of which tensor is where. Written last."""

CHECKSUMS = "checksums.json"
"""Size in bytes and CRC-32 of each file of a directory, by name."""

SNAPSHOT = "snapshot.pkl"
"""What a snapshot in memory has beside the parts of its ranks, see :mod:`lightning_dist.checkpoint.snapshot_read`."""

SAFETENSORS, CONFIG, WEIGHTS = ".safetensors", "config.json", "model.safetensors"

_WEIGHTS = (WEIGHTS, "pytorch_model.bin")

_REMOVED = ".removed"
"""How the name of a checkpoint ends that is being removed."""


@raised_on_all_ranks
class DamagedCheckpoint(ValueError):
    """A checkpoint that lacks a part, or whose bytes are not those that were written."""


def as_path(path: str | os.PathLike[str]) -> Path:
    """A local path, or the :class:`upath.UPath` of a URL, which has the methods of one, ``fs`` of fsspec, and ``path``,
    its key there. A ValueError where no filesystem is known for the URL, or its package is not installed.
    """
    if not isinstance(path, UPath) and "://" not in str(path):
        return Path(path)
    try:
        there = UPath(path)
        if there.protocol in ("file", "local"):
            return Path(there.path)
        there.fs.invalidate_cache()  # other processes write there too
    except (ImportError, ValueError) as error:
        raise ValueError(f"{path} can't be opened: {error}") from error
    return cast(Path, there)


def is_remote(path: Path) -> bool:
    """Whether it is at a URL."""
    return not isinstance(path, Path)


# Swaps: written beside the name, then given it


def temporary_sibling(path: Any) -> Any:
    """Where a checkpoint is written before it gets its name: beside it, so that a rename will do."""
    return path.with_name(f".{path.name}.incomplete")


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Where on the local disk to write what gets its name at the end; after an error nothing of it is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    remove(temporary)
    try:
        yield temporary
        put_in_place(temporary, path)
    except BaseException:
        remove(temporary)
        raise


def new_directory(path: Path) -> Path:
    """An empty directory to write a checkpoint to, that :func:`put_in_place` gives its name: beside that; at a URL
    under the name itself, unless what is there is complete.
    """
    is_free = is_remote(path) and not path.is_file() and not (path / METADATA).is_file()
    place = path if is_free else temporary_sibling(path)
    remove(place)
    place.mkdir(parents=True, exist_ok=True)
    return place


def put_in_place(complete: Path, path: Path) -> None:
    """Gives what is complete its name, in place of whatever had it: on the local disk by one rename, or one exchange of
    directories (Linux), so that the name is never free. Where there is no exchange, the previous one is moved aside.
    """
    if is_remote(path):
        _put_in_place_at_url(complete, path)
        return
    if path.is_symlink():
        path.unlink()  # Lightning's save_last="link"; what it points to stays
    if not path.exists() or (path.is_file() and complete.is_file()):
        os.replace(complete, path)
    elif _exchange(complete, path):
        remove(complete)
    else:
        aside = path.with_name(f".{path.name}.previous")
        remove(aside)
        os.rename(path, aside)
        os.rename(complete, path)
        remove(aside)
    with suppress(OSError):  # where the system lets a directory be flushed, the rename survives a power failure
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place_at_url(complete: Any, path: Any) -> None:
    if complete == path:
        remove(temporary_sibling(path))
        return
    remove(path)
    if complete.is_file():
        path.fs.mv(complete.path, path.path)
        return
    for file in sorted(complete.iterdir(), key=lambda file: file.name == METADATA):
        path.fs.copy(file.path, (path / file.name).path)
    remove(complete)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names atomically by Linux's ``renameat2``; False where there is none."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return rename(-100, os.fsencode(first), -100, os.fsencode(second), 2) == 0  # AT_FDCWD, RENAME_EXCHANGE


def flush(file: IO[Any]) -> None:
    """What was written to a file of the local disk survives a power failure; one at a URL is sent when it is closed."""
    file.flush()
    try:
        descriptor = file.fileno()
    except (OSError, AttributeError):
        return
    os.fsync(descriptor)


def resolve_swap(path: Path) -> Path:
    """Where a checkpoint is to be read: under its name, or beside it, if its replacement was ended on the way."""
    if is_remote(path) and not _is_complete(path) and _is_complete(temporary_sibling(path)):
        return temporary_sibling(path)
    return path


def _is_complete(path: Path) -> bool:
    return path.is_file() or all((path / name).is_file() for name in (REST, METADATA, CHECKSUMS))


def remove(path: Any) -> None:
    """Removes a file, a link (not what it points to) or a directory, if it is there; at a URL, its index first."""
    if is_remote(path):
        if (path / METADATA).exists():
            (path / METADATA).unlink()
        if path.exists():
            path.fs.rm(path.path, recursive=path.is_dir())
    elif path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def remove_checkpoint(path: str | os.PathLike[str]) -> None:
    """Removes a checkpoint of any format, if it is there; of a link, only the link. Rank 0 calls this. The checkpoint
    loses its name first, at a URL its index, so that nobody who ends in between leaves a part of it under that. A
    directory that is no checkpoint is left alone, with a ValueError.
    """
    path = as_path(path)
    is_directory = path.is_dir() and not (not is_remote(path) and path.is_symlink())
    if is_directory and not (path / REST).is_file() and not (path / METADATA).is_file():
        raise ValueError(f"{path} is no checkpoint, so it is not removed")
    if is_remote(path):
        remove(path)
        remove(temporary_sibling(path))
        return
    if is_directory:
        without_name = path.with_name(f".{path.name}{_REMOVED}")
        remove(without_name)
        path = path.rename(without_name)
    remove(path)
    for rest in path.parent.glob(f".*{_REMOVED}"):  # of a run that was ended here
        if all(file.name.startswith(METADATA) or file.suffix in (".pt", ".distcp", ".json") for file in rest.iterdir()):
            shutil.rmtree(rest, ignore_errors=True)


def validate_target(path: Path) -> None:
    """Raises ValueError for a directory with anything but one checkpoint, or weights: it is not to be replaced."""
    if not path.is_dir() or (not is_remote(path) and path.is_symlink()):
        return
    visible = [file for file in path.iterdir() if not file.name.startswith(".")]
    other = next((file for file in visible if file.is_dir() or file.suffix == ".ckpt"), None)
    if other is None and not (path / METADATA).exists() and not any(map(_marks_checkpoint, visible)):
        other = next(iter(visible), None)
    if other is not None:
        raise ValueError(
            f"{path} is a directory that holds {other.name}, so a checkpoint does not replace it; name the checkpoint "
            "itself, or remove the directory"
        )


def _marks_checkpoint(file: Path) -> bool:
    """Whether a file says that its directory is a checkpoint, or was to become one, or holds weights."""
    is_part = file.name in (REST, CHECKSUMS) or file.suffix in (".distcp", SAFETENSORS)
    return is_part or file.name.startswith("pytorch_model")


# Copies on this machine of what lies at a URL


@contextmanager
def local_copy(path: Any) -> Iterator[Path]:
    """A copy here of a file or a directory of weights, gone at the end, what was mapped stays; a local path itself."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="lightning_dist-", ignore_cleanup_errors=True) as scratch:
        local = Path(scratch) / path.name
        if path.is_dir():
            local.mkdir()
            for file in path.iterdir():
                if file.suffix in (".json", SAFETENSORS, ".bin"):
                    path.fs.get_file(file.path, str(local / file.name))
        else:
            path.fs.get_file(path.path, str(local))
        try:
            yield local
        except ValueError as error:
            raise type(error)(str(error).replace(str(local), str(path))) from error


@contextmanager
def upload_on_exit(path: Any) -> Iterator[Path]:
    """Where on this machine to write a file, or a directory of weights, which is sent to its URL at the end; of that,
    what says which parts it has goes last. A local path is given as it is.
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="lightning_dist-", ignore_cleanup_errors=True) as scratch:
        local = Path(scratch) / path.name
        yield local
        place = temporary_sibling(path) if path.is_dir() else path
        if local.is_file():
            path.fs.put_file(str(local), place.path)
        else:
            place.mkdir(parents=True, exist_ok=True)
            for file in sorted(local.iterdir(), key=lambda file: (file.suffix == ".json", file.name)):
                path.fs.put_file(str(file), (place / file.name).path)
        if place != path:
            put_in_place(place, path)


# Formats, told by the names of files


def format_of(path: Path) -> Format:
    """``"single"``, a file of ``torch.save``; ``"sharded"``, a directory of shards; or ``"weights"``, a file of
    safetensors, or a directory of weights as transformers and timm write it. A FileNotFoundError where nothing is
    there; a ValueError for a directory that is no checkpoint, or an incomplete one.
    """
    if not path.exists():
        raise FileNotFoundError(f"Checkpoint file not found: {path}")
    if not path.is_dir():
        return "weights" if path.suffix == SAFETENSORS else "single"
    if (path / SNAPSHOT).is_file():
        return "sharded"
    has_rest, has_index = (path / REST).is_file(), (path / METADATA).is_file()
    if has_rest and has_index:
        return "sharded"
    if has_rest or has_index:
        lost = METADATA if has_rest else REST
        raise DamagedCheckpoint(f"checkpoint {path} is incomplete: it has no {lost}; its save did not finish")
    if weight_files(path):
        return "weights"
    raise ValueError(
        f"{path} is a directory, but no checkpoint: it has neither {REST} nor {METADATA}, nor weights such as "
        "model.safetensors; pass a .ckpt file, or the directory of a sharded checkpoint itself"
    )


def weight_files(path: Path) -> list[Path]:
    """The files of weights at a path: itself, or those of a directory; empty where it has none. A ValueError where an
    index can't be read, names a file outside the directory, or one that is not there.
    """
    if path.is_file():
        return [path]
    for name in _WEIGHTS:
        index = path / f"{name}.index.json"
        if index.is_file():
            return _indexed(path, index)
    found = [path / name for name in _WEIGHTS if (path / name).is_file()]
    return found[:1] or sorted(path.glob(f"*{SAFETENSORS}"))


def _indexed(path: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [path / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{index} is no index of weights, or a damaged one ({error})") from error
    for file in files:
        if file.resolve().parent != path.resolve():
            raise ValueError(f"{index} refers to {file.name!r}, outside its directory; it is refused")
        if not file.is_file():
            raise DamagedCheckpoint(f"{path} is incomplete: its part {file.name} is missing")
    return files
