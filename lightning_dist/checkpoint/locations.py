"""Where a checkpoint lies, on the local disk or at a URL as ``s3://bucket/run/last.ckpt``, and how it gets its name.

It appears under its name when it is complete, and not before. URLs are universal_pathlib's.

[Note: complete or not, at an object store]
A store has no rename that takes one moment, but an object appears whole. So a directory is complete when index and
checksums are there, which are written last; the index is copied last and removed first. One that replaces another is
written beside it and then copied under its name; until that copy is complete, readers take the one beside
(:func:`resolve_swap`). A filesystem whose files appear before they are whole, as by sftp, gives this for directories
only.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from upath import UPath

from lightning_dist.checkpoint.formats import CHECKSUMS, METADATA, REST, SAFETENSORS

_COPIED = (".json", SAFETENSORS, ".bin")
"""Files of a directory of weights that are read."""

_REMOVED = ".removed"
"""How the name of a checkpoint ends that is being removed."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def as_path(path: str | os.PathLike[str]) -> Path:
    """A local path, or the :class:`upath.UPath` of a URL, which has the methods of one.

    Raises:
        ValueError: no filesystem is known for the URL, or its package is not installed.
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


def remote_files(path: Path) -> Any:
    """The filesystem of a URL, of fsspec."""
    return cast(Any, path).fs


def remote_key(path: Path) -> str:
    """What the filesystem of a URL calls it."""
    return str(cast(Any, path).path)


# Swaps: written beside the name, then given it


def temporary_sibling(path: Path) -> Path:
    """Where a checkpoint is written before it gets its name: beside it, so that a rename will do."""
    return path.with_name(f".{path.name}.incomplete")


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Where on the local disk to write a file or a directory, which gets its name at the end; after an error nothing of
    it is left, and what had the name is whole.
    """
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
    """An empty directory to write a checkpoint to, that :func:`put_in_place` gives its name.

    It is beside the name; at a URL under the name itself, unless what is there is complete.
    """
    is_free = is_remote(path) and not path.is_file() and not (path / METADATA).is_file()
    place = path if is_free else temporary_sibling(path)
    remove(place)
    place.mkdir(parents=True, exist_ok=True)
    return place


def put_in_place(complete: Path, path: Path) -> None:
    """Gives what is complete its name, in place of whatever had it.

    On the local disk by one rename, or one exchange where a directory is replaced (Linux), so there is no moment
    without a checkpoint under that name. Where the system knows no exchange, the previous one is moved aside first.
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
    _flush_directory(path.parent)


def _put_in_place_at_url(complete: Path, path: Path) -> None:
    files = remote_files(path)
    if complete == path:
        remove(temporary_sibling(path))
        return
    remove(path)
    if complete.is_file():
        files.mv(remote_key(complete), remote_key(path))
        return
    for file in sorted(complete.iterdir(), key=lambda file: file.name == METADATA):
        files.copy(remote_key(file), remote_key(path / file.name))
    remove(complete)


def resolve_swap(path: Path) -> Path:
    """Where a checkpoint is to be read: under its name, or beside it, if its replacement was ended on the way."""
    if is_remote(path) and not _is_complete(path) and _is_complete(temporary_sibling(path)):
        return temporary_sibling(path)
    return path


def remove(path: Path) -> None:
    """Removes a file, a link (not what it points to) or a directory; nothing if there is none. At a URL it is
    incomplete first.
    """
    if is_remote(path):
        if (path / METADATA).exists():
            (path / METADATA).unlink()
        if path.exists():
            remote_files(path).rm(remote_key(path), recursive=path.is_dir())
    elif path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint, if it is there; of a link, only the link.

    It loses its name first, at a URL its index, so that nobody who ends in between leaves a part of it under that.

    Raises:
        ValueError: a directory that is no checkpoint: it is left alone.
    """
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
    """A directory with anything but one checkpoint, or weights, is not to be replaced.

    Raises:
        ValueError: there is one.
    """
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


# Copies on this machine of what lies at a URL


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """A copy on this machine of a file or of a directory of weights, gone at the end: what was mapped stays.

    A local path is given as it is.
    """
    if not is_remote(path):
        yield path
        return
    with _scratch() as scratch:
        local = scratch / path.name
        if path.is_dir():
            local.mkdir()
            for file in path.iterdir():
                if file.suffix in _COPIED:
                    remote_files(path).get_file(remote_key(file), str(local / file.name))
        else:
            remote_files(path).get_file(remote_key(path), str(local))
        try:
            yield local
        except ValueError as error:
            raise type(error)(str(error).replace(str(local), str(path))) from error


@contextmanager
def upload_on_exit(path: Path) -> Iterator[Path]:
    """Where on this machine to write a file, or a directory of weights, which is sent to its URL at the end.

    A local path is given as it is. Of a directory, what says which parts it has goes last.
    """
    if not is_remote(path):
        yield path
        return
    files = remote_files(path)
    with _scratch() as scratch:
        local = scratch / path.name
        yield local
        place = temporary_sibling(path) if path.is_dir() else path
        if local.is_file():
            files.put_file(str(local), remote_key(place))
        else:
            place.mkdir(parents=True, exist_ok=True)
            for file in sorted(local.iterdir(), key=lambda file: (file.suffix == ".json", file.name)):
                files.put_file(str(file), remote_key(place / file.name))
        if place != path:
            put_in_place(place, path)


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lightning_dist-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _marks_checkpoint(file: Path) -> bool:
    """Whether a file says that its directory is a checkpoint, or was to become one, or holds weights."""
    return (
        file.name in (REST, CHECKSUMS)
        or file.suffix in (".distcp", SAFETENSORS)
        or file.name.startswith("pytorch_model")
    )


def _is_complete(path: Path) -> bool:
    return path.is_file() or all((path / name).is_file() for name in (REST, METADATA, CHECKSUMS))


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names atomically by Linux's ``renameat2``; False where there is none."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    names = os.fsencode(first), os.fsencode(second)
    return rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def _flush_directory(path: Path) -> None:
    """Makes a rename survive a power failure, where the system lets a directory be flushed."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
