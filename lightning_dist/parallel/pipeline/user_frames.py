"""Which line of the user's code asks for something: the innermost that is no library's."""

from __future__ import annotations

import inspect
from types import FrameType

import torch

from lightning_dist.divided.readers import DEEPEST, LIBRARIES


def where(line: FrameType) -> str:
    """What to call a line in an error."""
    return f"{line.f_code.co_qualname}, line {line.f_lineno}"


def line_of_user() -> FrameType | None:
    """The innermost frame around the caller's that is no library's; None where Lightning, this package or an optimizer
    asks. Lightning's callbacks read and write parameters as a user's do.
    """
    frame = inspect.currentframe()
    for _ in range(2):
        frame = None if frame is None else frame.f_back
    for _ in range(DEEPEST):
        if frame is None:
            return None
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith(_ALLOWED) and not name.startswith("lightning_dist.divided."):
            return None
        if frame.f_code.co_varnames[:1] == ("self",) and isinstance(frame.f_locals.get("self"), torch.optim.Optimizer):
            return None
        if name.partition(".")[0] not in LIBRARIES or name.startswith("lightning.pytorch.callbacks"):
            return frame
        frame = frame.f_back
    return None


_ALLOWED = (
    "lightning_dist.",
    "lightning.pytorch.loops",
    "lightning.pytorch.trainer",
    "lightning.pytorch.strategies",
    "lightning.pytorch.utilities.model_summary",
)
"""Whose own code asks for what it may."""
