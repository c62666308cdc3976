"""Names on the local disk: a checkpoint appears under its own when it is complete, and not before."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

REST = "meta.pt"
"""What a sharded checkpoint holds beside its tensors; Lightning's strategies use the same name."""

METADATA = ".metadata"
"""The index of torch.distributed.checkpoint: which part of which tensor is where. Written last."""

REMOVED = ".removed"
"""How the name of a checkpoint ends that is being removed."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def temporary_sibling(path: Path) -> Path:
    """Where a checkpoint is written before it gets its name: beside it, so that a rename will do."""
    return path.with_name(f".{path.name}.incomplete")


def put_in_place(complete: Path, path: Path) -> None:
    """Gives what is complete its name, in place of whatever had it.

    One rename, or one exchange where a directory is replaced (Linux), so there is no moment without a
    checkpoint under that name. Where the system knows no exchange, the previous one is moved aside first.
    """
    if path.is_symlink():
        path.unlink()  # Lightning's save_last="link"; what it points to stays
    if not path.exists() or (path.is_file() and complete.is_file()):
        os.replace(complete, path)
    elif _exchange(complete, path):
        remove_any(complete)
    else:
        aside = path.with_name(f".{path.name}.previous")
        remove_any(aside)
        os.rename(path, aside)
        os.rename(complete, path)
        remove_any(aside)
    _flush_directory(path.parent)


def remove_any(path: Path) -> None:
    """Removes a file, a link (not what it points to) or a directory; nothing if there is none."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


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
