"""What the checks are told: how many ranks, on which device, how long they may take, where they may write."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

FEWEST_CPU_RANKS, MOST_CPU_RANKS = 2, 4


@dataclass(frozen=True)
class Fault:
    """Something that is wrong on purpose. Only tests of the checks pass one: no option or variable does.

    Args:
        kind: ``"wrong weight"``: before the second step of every training the rank flips the sign of a weight, of the
            copy or part that it holds. ``"short timeout"``: the process groups of the pipeline or tensor axis get a
            timeout of half a second. ``"full disk"``: no file that the rank writes may be larger than 4 KiB (a resource
            limit of its process). ``"silence"``: the rank never begins its work.
        rank: that has it; for ``"short timeout"`` it is all of them.
    """

    kind: Literal["wrong weight", "short timeout", "full disk", "silence"]
    rank: int = 0


@dataclass(frozen=True)
class Settings:
    """Of all checks.

    Args:
        num_ranks: processes that train together; one device each.
        device_type: ``"cpu"``, or of the accelerator.
        timeout: seconds for one check.
        directory: where checkpoints are written; what is written is removed.
        patience: seconds that the other ranks get to say what they met when one has failed.
        fault: see :class:`Fault`.
    """

    num_ranks: int
    device_type: str
    timeout: float
    directory: Path
    fault: Fault | None = None
    patience: float = 10.0

    def has_fault(self, kind: str, rank: int | None = None) -> bool:
        """Whether this rank, or any, is to be wrong in this way."""
        return self.fault is not None and self.fault.kind == kind and rank in (None, self.fault.rank)


def usable_accelerators() -> tuple[str, int]:
    """Type and number of the accelerators for which torch.distributed has a backend; ``("cpu", 0)`` without one."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type not in dist.Backend.default_device_backend_map:
        return "cpu", 0
    return accelerator.type, torch.accelerator.device_count()


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_ranks(devices: int | None, accelerator: str) -> tuple[int, str]:
    """The number of ranks and the type of their devices.

    Args:
        devices: that the user asked for; None for the accelerators that are there, or on the CPU one rank a core, of 2
            cores or more 4.
        accelerator: ``"auto"`` or ``"cpu"``.

    Raises:
        ValueError: fewer accelerators are there than were asked for, or fewer than one.
    """
    if devices is not None and devices < 1:
        raise ValueError(f"--devices is {devices}; the checks need at least one rank")
    device_type, count = usable_accelerators() if accelerator == "auto" else ("cpu", 0)
    if count == 0:
        return devices or (MOST_CPU_RANKS if num_cores() >= 2 else FEWEST_CPU_RANKS), "cpu"
    if devices is not None and devices > count:
        raise ValueError(
            f"--devices is {devices}, and there are {count} of {device_type}; pass at most {count}, or --accelerator "
            "cpu for ranks without accelerators"
        )
    return devices or count, device_type
