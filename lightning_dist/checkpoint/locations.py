"""Where a checkpoint lies: on the local disk, or at a URL as ``s3://bucket/run/last.ckpt``, by universal_pathlib.

[Note: complete or not, at an object store]
A store has no rename that takes one moment, but an object appears whole. So a directory is complete when index and
checksums are there, which are written last; the index is copied last and removed first. One that replaces another is
written beside it and then copied under its name; until that copy is complete, readers take the one beside
(:func:`settled`). A filesystem whose files appear before they are whole, as by sftp, gives this for directories only.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemBase
from upath import UPath

from lightning_dist.checkpoint import files
from lightning_dist.checkpoint.checksums import CHECKSUMS, Summing, SummingFileSystem
from lightning_dist.checkpoint.files import METADATA, REST, temporary_sibling

_FETCHED = (".json", ".safetensors", ".bin")
"""Files of a directory of weights that are read."""


def located(path: str | os.PathLike[str]) -> Path:
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


def settled(path: Path) -> Path:
    """Where a checkpoint is to be read: under its name, or beside it, if its replacement was ended on the way."""
    if is_remote(path) and not _is_complete(path) and _is_complete(temporary_sibling(path)):
        return temporary_sibling(path)
    return path


def new_place(path: Path) -> Path:
    """An empty directory to write a checkpoint to, that :func:`put_in_place` gives its name.

    It is beside the name; at a URL under the name itself, unless what is there is complete.
    """
    is_free = is_remote(path) and not path.is_file() and not (path / METADATA).is_file()
    place = path if is_free else temporary_sibling(path)
    remove(place)
    place.mkdir(parents=True, exist_ok=True)
    return place


def refuse_others(path: Path) -> None:
    """A directory with anything but one checkpoint, or weights, is not to be replaced.

    Raises:
        ValueError: there is one.
    """
    if not path.is_dir() or (not is_remote(path) and path.is_symlink()):
        return
    visible = [file for file in path.iterdir() if not file.name.startswith(".")]
    other = next((file for file in visible if file.is_dir() or file.suffix == ".ckpt"), None)
    if other is None and not (path / METADATA).exists() and not any(map(_tells, visible)):
        other = next(iter(visible), None)
    if other is not None:
        raise ValueError(
            f"{path} is a directory that holds {other.name}, so a checkpoint does not replace it; name the checkpoint "
            "itself, or remove the directory"
        )


def put_in_place(complete: Path, path: Path) -> None:
    """Gives a directory, or a file in place of one, its name."""
    if not is_remote(path):
        files.put_in_place(complete, path)
        return
    if complete == path:
        remove(temporary_sibling(path))
        return
    remove(path)
    if complete.is_file():
        _fs(path).mv(_key(complete), _key(path))
        return
    for file in sorted(complete.iterdir(), key=lambda file: file.name == METADATA):
        _fs(path).copy(_key(file), _key(path / file.name))
    remove(complete)


def remove(path: Path) -> None:
    """Removes a file, a link or a directory; nothing if there is none. At a URL it is incomplete first."""
    if not is_remote(path):
        files.remove_any(path)
        return
    if (path / METADATA).exists():
        (path / METADATA).unlink()
    if path.exists():
        _fs(path).rm(_key(path), recursive=path.is_dir())


@contextmanager
def fetched(path: Path) -> Iterator[Path]:
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
                if file.suffix in _FETCHED:
                    _fs(path).get_file(_key(file), str(local / file.name))
        else:
            _fs(path).get_file(_key(path), str(local))
        try:
            yield local
        except ValueError as error:
            raise type(error)(str(error).replace(str(local), str(path))) from error


@contextmanager
def delivered(path: Path) -> Iterator[Path]:
    """Where on this machine to write a file, or a directory of weights, which is sent to its URL at the end.

    A local path is given as it is. Of a directory, what says which parts it has goes last.
    """
    if not is_remote(path):
        yield path
        return
    with _scratch() as scratch:
        local = scratch / path.name
        yield local
        place = temporary_sibling(path) if path.is_dir() else path
        if local.is_file():
            _fs(path).put_file(str(local), _key(place))
        else:
            place.mkdir(parents=True, exist_ok=True)
            for file in sorted(local.iterdir(), key=lambda file: (file.suffix == ".json", file.name)):
                _fs(path).put_file(str(file), _key(place / file.name))
        if place != path:
            put_in_place(place, path)


def file_system(path: Path, sums: dict[str, tuple[int, int]] | None = None) -> FileSystem:
    """The files that torch.distributed.checkpoint reads or writes.

    Args:
        path: of the directory.
        sums: filled with size and CRC-32 of each file that is written, by name.
    """
    sums = {} if sums is None else sums
    # torch's reader and writer take any FileSystemBase, whatever the type of their attribute says
    return cast(FileSystem, _RemoteFiles(sums)) if is_remote(path) else SummingFileSystem(sums)


class _RemoteFiles(FileSystemBase):
    def __init__(self, sums: dict[str, tuple[int, int]]) -> None:
        self._sums = sums

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[io.IOBase, None, None]:
        with path.open(mode) as file:
            if mode != "wb":
                yield file
                return
            with Summing(_LeftOpen(file)) as stream:
                yield cast(io.IOBase, stream)
            self._sums[path.name] = stream.size, stream.sum

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    def rename(self, path: Any, new_path: Any) -> None:
        _fs(path).mv(_key(path), _key(new_path))
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


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lightning_dist-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _tells(file: Path) -> bool:
    """Whether a file says that its directory is a checkpoint, or was to become one, or holds weights."""
    return (
        file.name in (REST, CHECKSUMS)
        or file.suffix in (".distcp", ".safetensors")
        or file.name.startswith("pytorch_model")
    )


def _is_complete(path: Path) -> bool:
    return path.is_file() or all((path / name).is_file() for name in (REST, METADATA, CHECKSUMS))


def _fs(path: Path) -> Any:
    return cast(Any, path).fs


def _key(path: Path) -> str:
    return str(cast(Any, path).path)
