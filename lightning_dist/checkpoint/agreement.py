"""What one rank finds out, all ranks act on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from lightning_dist.checkpoint.formats import DamagedCheckpoint

_SHARED_TYPES: tuple[type[Exception], ...] = (
    DamagedCheckpoint,
    ValueError,
    FileNotFoundError,
    PermissionError,
    OSError,
)


def global_rank() -> int:
    """The rank in the world; 0 where there is no process group."""
    return dist.get_rank() if _is_distributed() else 0


def num_ranks() -> int:
    """Size of the world; 1 where there is no process group."""
    return dist.get_world_size() if _is_distributed() else 1


def from_rank_zero(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """``value`` of rank 0 on every rank. One broadcast of the pickled value over the world, or a group of all ranks."""
    if not _is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


@contextmanager
def together(purpose: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """An error that any rank meets inside is raised on every rank, so that none waits for another.

    Nothing inside may communicate. One all-gather of a short string per rank over the world at the end.

    Args:
        purpose: completes "could not ..." where the error is none that a user can act on by its message
            alone.
        group: of all ranks, for a thread that communicates beside others. Default: the world.

    Raises:
        ValueError, OSError, RuntimeError: that of the lowest rank that failed.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if not _is_distributed():
        if error is not None:
            raise error
        return
    verdicts: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(verdicts, None if error is None else _describe(error), group)
    failed = [rank for rank, verdict in enumerate(verdicts) if verdict is not None]
    if failed:
        if error is not None and failed[0] == dist.get_rank():
            raise error
        kind, message = verdicts[failed[0]]  # type: ignore[misc]
        shared = {known.__name__: known for known in _SHARED_TYPES}.get(kind)
        if shared is None:
            raise RuntimeError(f"could not {purpose}: rank {failed[0]} met {kind}: {message}") from error
        raise shared(message) from error


def _describe(error: Exception) -> tuple[str, str]:
    return type(error).__name__, str(error)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
