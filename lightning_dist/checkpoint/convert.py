"""From a directory of shards to Lightning's single file."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_dist.checkpoint.disk import is_sharded, load
from lightning_dist.checkpoint.single import gather_state, write_atomically


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    weights_only: bool | None = None,
) -> Path:
    """Writes a sharded checkpoint, ours or one of Lightning's strategies', as a single file of plain
    Lightning.

    Runs in one process, without a process group; needs host memory for the whole checkpoint.

    Args:
        source: the directory.
        target: the file to write; it appears when it is complete.
        overwrite: replace a file that is there.
        weights_only: as in ``torch.load``.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: there is no ``source``.
        ValueError: ``source`` is a single file already, or no checkpoint; ``target`` exists.
    """
    source, target = Path(source), Path(target)
    if not is_sharded(source):
        raise ValueError(f"{source} is a single file already; plain Lightning opens it as it is")
    if target.is_dir():
        raise ValueError(f"{target} is a directory; name the file to write")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists; pass another name, or overwrite it explicitly")
    write_atomically(gather_state(load(source, weights_only=weights_only)), target)
    return target
