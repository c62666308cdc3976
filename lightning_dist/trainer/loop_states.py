"""Lightning's states of a fit's loops, as a checkpoint has them: set to what they were at another moment (2.6.6)."""

from __future__ import annotations

from typing import Any


def take_back(loops: dict[str, Any], batches: int) -> None:
    """Sets the states to what they were so many batches before, when the last one had ended."""
    progress = loops["fit_loop"]["epoch_loop.batch_progress"]
    for part in ("total", "current"):
        before = progress[part]["processed"] - batches
        progress[part] = dict.fromkeys(progress[part], before)


def leave_epoch_that_has_not_started(loops: dict[str, Any]) -> None:
    """Sets the states, as ``on_train_epoch_start`` sees them, to those at the end of the epoch before: Lightning would
    take that one's batches for those of the next.
    """
    for part in ("total", "current"):
        progress = loops["fit_loop"]["epoch_progress"][part]
        if progress["ready"] > progress["started"]:
            progress["ready"] = progress["started"]


def reopen_epoch(loops: dict[str, Any]) -> None:
    """Sets the states to an epoch that goes on."""
    progress = loops["fit_loop"]["epoch_progress"]
    for part in ("total", "current"):
        progress[part]["processed"] = progress[part]["completed"] = progress[part]["started"] - 1
