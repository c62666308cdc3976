"""Where a thread is, as its Python stack says: in code of its own, waiting for its data, or for other ranks.

[Note: frames of a thread that runs]
Python makes the object of a frame when it is asked for. Before 3.12 that may collect garbage, whose end may let other
threads run: the frame returns meanwhile, and the object points to memory that is gone. A walk over it ends the process
(seen in 3.11.7). So the objects of a whole stack are made at once, while nothing is collected; ``gc.disable`` would be
seen by code that asks whether it is.
"""

from __future__ import annotations

import gc
import linecache
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType

import lightning
import torch
from torch.distributed import distributed_c10d

from lightning_dist.compat.distributed import functional_collectives

OWN, DATA, WAITS = "own", "data", "waits"
"""What a thread does: what the user and the libraries compute, fetch a batch, wait for other ranks."""

_COLLECTS_ANYWHERE = sys.version_info < (3, 12)
_TORCH = str(Path(torch.__file__).parent) + os.sep
_OPERATORS = f"{_TORCH}_ops.py"
_BACKWARD = f"{_TORCH}autograd{os.sep}graph.py"
_COLLECTIVES = (distributed_c10d.__file__, functional_collectives.__file__)
_OURS = str(Path(__file__).parents[1]) + os.sep
_LIBRARIES = (
    *(_TORCH, _OURS, str(Path(lightning.__file__).parent) + os.sep, str(Path(os.__file__).parent) + os.sep),
    "<frozen",
)
_LOADERS = (os.path.join(_TORCH, "utils", "data", "dataloader.py"), os.path.join("loops", "fetchers.py"))
_HOOK = re.compile(
    r"on_\w+|configure_\w+|(training|validation|test|predict|optimizer)_step|\w+_dataloader|setup|prepare_data|"
    r"forward|backward|save_checkpoint|load_checkpoint|state_dict|load_state_dict"
)


def frame_of(thread: threading.Thread) -> FrameType | None:
    """The innermost frame of a thread; None if it has ended. See [Note: frames of a thread that runs]."""
    if not _COLLECTS_ANYWHERE:
        return sys._current_frames().get(thread.ident or 0)
    thresholds = gc.get_threshold()
    gc.set_threshold(0)
    try:
        frame = sys._current_frames().get(thread.ident or 0)
        for _ in _outwards(frame):
            pass
        return frame
    finally:
        if not gc.get_threshold()[0]:  # else somebody has set others meanwhile
            gc.set_threshold(*thresholds)


def what_it_does(thread: threading.Thread, frame: FrameType) -> str:
    """One of :data:`OWN`, :data:`DATA` and :data:`WAITS`. Takes some microseconds, in a backward pass some twenty."""
    if is_waiting(thread, frame):
        return WAITS
    return DATA if any(of.f_code.co_filename.endswith(_LOADERS) for of in _outwards(frame)) else OWN


def is_waiting(thread: threading.Thread, frame: FrameType) -> bool:
    """Whether a thread waits for other ranks: the innermost call is one of torch's collectives, or waits for one.

    Within a backward pass, torch's DDP waits where Python does not see it: there a thread that the system has put to
    sleep waits, where the system tells.
    """
    if frame.f_code.co_filename == _BACKWARD:
        return sleeps(thread)
    while frame.f_code.co_filename == _OPERATORS and frame.f_back is not None:
        if "c10d" in getattr(frame.f_locals.get("self"), "namespace", ""):  # whoever called it
            return True
        frame = frame.f_back
    return _waits(frame.f_code, frame.f_lineno)


def sleeps(thread: threading.Thread) -> bool:
    """Whether the system has put a thread to sleep; False where it does not tell."""
    try:
        text = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] == "S"


@lru_cache(maxsize=4096)
def _waits(code: CodeType, line: int | None) -> bool:
    """A frame that moves may be at no line."""
    name = code.co_filename
    if name in _COLLECTIVES:
        return True
    source = linecache.getline(name, line or 0)
    return "wait_tensor" in source or (name.startswith((_TORCH, _OURS)) and ".wait(" in source)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def place(thread: threading.Thread, frame: FrameType) -> str:
    """Where a thread is, for a sentence: ``"is in training_step (script.py:12 in fetch)"``."""
    frames = list(_outwards(frame))
    own = next((of for of in frames if not of.f_code.co_filename.startswith(_LIBRARIES)), frame)
    where = within(own)
    if what_it_does(thread, frame) == DATA:
        loads = any(of.f_code.co_filename.endswith(_LOADERS[0]) for of in frames)
        return f"waits for its data: {'DataLoader' if loads else 'its loader'} ({where})"
    hook = next((of.f_code.co_name for of in frames if _HOOK.fullmatch(of.f_code.co_name)), None)
    return f"is in {where if hook in (None, own.f_code.co_name) else f'{hook} ({where})'}"


def within(frame: FrameType) -> str:
    """File, line and function."""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


def stack(frame: FrameType) -> str:
    """The stack as text, as a traceback shows it, without what lies within libraries but for its end."""
    frames, lines, skipped = traceback.extract_stack(frame), list[str](), 0
    for number, one in enumerate(frames, 1):
        if one.filename.startswith(_LIBRARIES) and number <= len(frames) - 2:
            skipped += 1
            continue
        if skipped:
            lines.append(f"  ... {skipped} frames of libraries ...\n")
        lines += traceback.format_list([one])
        skipped = 0
    return "".join(lines).rstrip()
