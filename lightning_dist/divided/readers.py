"""Who asks for the whole of a divided tensor: all ranks that hold a part have to.

[Note: ranks that ask alone]
``if trainer.is_global_zero: print(p.norm())`` would wait for ranks that wait elsewhere, or take what they send for
something else as its own. So the first time that a line of the user's code asks, the ranks meet at the store of the
process group, which needs no collective; a rank that stays alone there says so. From then on that line is trusted.
What ``rank_zero_only`` runs is refused at once.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from functools import cache, lru_cache
from types import CodeType, FrameType
from typing import Any

import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed.tensor import DTensor

from lightning_dist.compat.distributed import default_store
from lightning_dist.elastic.guard import what_ended_another

PATIENCE = timedelta(seconds=30)
"""For how long a rank waits for the others to come to a line for the first time."""

DEEPEST = 60
"""Calls to look at."""

LIBRARIES = {"abc", "contextlib", "copy", "functools", "pickle", "torch", "torchmetrics"}
LIBRARIES |= {"lightning", "lightning_dist", "lightning_fabric", "pytorch_lightning"}
"""Whose lines are not the user's, though they ask on a user's behalf."""


def agree_to_read(tensor: DTensor) -> None:
    """Makes sure that all ranks which hold a part of the tensor run the code that asks for the whole.

    Communication: none, but the first time that a line asks one meeting at the store of the process group.

    Raises:
        RuntimeError: only some ranks do, or ``rank_zero_only`` runs it.
    """
    line = _line_of_user(sys._getframe(1))
    if line is not None and tensor.device_mesh.size() > 1 and dist.is_initialized():
        _meet_at(line, tensor.device_mesh.mesh.flatten().tolist())


def asked_by_user() -> bool:
    """Whether the user's code is what asks, and not this package."""
    return _line_of_user(sys._getframe(1)) is not None


def meet(frame: FrameType, ranks: list[int]) -> None:
    """As :func:`agree_to_read`, for the ranks of a group, at a line of the user's."""
    line = _line_of_user(frame)
    if line is not None:
        _meet_at(line, ranks)


@lru_cache(maxsize=1)
def _places_met(store: Any) -> set[tuple[str, int, str]]:
    """The lines at which all ranks have met over the store of the present process group; those of another go."""
    return set()


def _meet_at(line: FrameType, ranks: list[int]) -> None:
    store: Any = default_store()
    place = (line.f_code.co_filename, line.f_lineno, f"{min(ranks)}/{len(ranks)}")
    if place in _places_met(store):
        return
    key = f"lightning_dist/divided/{place}"
    if store.add(key, 1) == len(ranks):
        store.set(f"{key}/all", b"1")
    until = time.monotonic() + PATIENCE.total_seconds()
    while not _is_set(store, f"{key}/all"):
        if said := what_ended_another():
            raise RuntimeError(f"another rank ended before: {said}")
        if time.monotonic() > until:
            raise RuntimeError(_alone(f"{line.f_code.co_qualname}, line {line.f_lineno}, run by only some ranks,"))
    _places_met(store).add(place)


def _is_set(store: Any, key: str) -> bool:
    try:
        store.wait([key], min(PATIENCE, timedelta(seconds=1)))
    except RuntimeError:
        return False
    return True


def _line_of_user(frame: FrameType | None) -> FrameType | None:
    """The innermost that is no library's.

    Raises:
        RuntimeError: ``rank_zero_only`` is around it.
    """
    found, guard = None, _guard()
    for _ in range(DEEPEST):
        if frame is None:
            break
        if frame.f_code is guard:
            raise RuntimeError(_alone("a function that only rank 0 runs (rank_zero_only)"))
        name = str(frame.f_globals.get("__name__", ""))
        if found is None and name.startswith("lightning_dist.") and not name.startswith("lightning_dist.divided"):
            return None  # what asks is this package, on all ranks alike
        if found is None and name.partition(".")[0] not in LIBRARIES:
            found = frame
        frame = frame.f_back
    return found


@cache
def _guard() -> CodeType:
    """The code of what ``rank_zero_only`` makes of a function (lightning_utilities 0.15)."""
    return rank_zero_only(lambda: None).__code__


def _alone(who: str) -> str:
    return (
        f"{who} asked for the whole of a parameter, gradient or optimizer state of which each rank holds a part; all "
        "ranks have to ask: compute the number on every rank, and use it where you like"
    )
