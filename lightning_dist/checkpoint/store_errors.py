"""Errors by which a store says that it can't take a checkpoint now."""

from __future__ import annotations

from torch.distributed.checkpoint.api import CheckpointException

from lightning_dist.collectives import raised_on_all_ranks

_CLIENTS = frozenset(
    ("adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs", "urllib3")
)
"""Packages whose own errors, of whatever class, come from a store or the way to it."""


@raised_on_all_ranks
class StoreRefused(OSError):
    """A disk that is full, a folder that can't be written, a store that is away."""


def is_of_store(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is one of the system or of a store's client."""
    while error is not None:
        if isinstance(error, (OSError, TimeoutError)) or type(error).__module__.partition(".")[0] in _CLIENTS:
            return True
        if isinstance(error, CheckpointException):
            causes = (cause[0] if isinstance(cause, tuple) else cause for cause in error.failures.values())
            return any(map(is_of_store, causes))
        error = error.__cause__ or error.__context__  # torch.save raises another error over that of the file
    return False
