"""Functions that the ranks of the launch tests run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed


def describe(directory: str) -> dict[str, Any]:
    _note_pid(directory)
    torch.distributed.init_process_group("gloo")
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    return {"rank": int(os.environ["RANK"]), "ranks": total.item(), "threads": torch.get_num_threads()}


def fail_as_second_rank(directory: str) -> None:
    """The second rank raises; the first waits for it and loses the connection."""
    _note_pid(directory)
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 1:
        raise ArithmeticError("the second rank fails on purpose")
    torch.distributed.barrier()


def die_once(directory: str) -> int:
    """The second rank of the first attempt is killed while the first waits for it."""
    _note_pid(directory)
    torch.distributed.init_process_group("gloo")
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    torch.distributed.barrier()
    if attempt == 0 and torch.distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()
    return attempt


def _note_pid(directory: str) -> None:
    (Path(directory) / f"rank-{os.getpid()}").touch()


def die_at_first(directory: str) -> float:
    """The second rank is killed while the first waits for it, unless that has happened before."""
    _note_pid(directory)
    torch.distributed.init_process_group("gloo")
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    if torch.distributed.get_rank() == 1 and len(list(Path(directory).glob("rank-*"))) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()
    return total.item()
