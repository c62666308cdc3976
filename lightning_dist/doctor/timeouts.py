"""Whether every group of a layout has the timeout that was asked for, and waits for a rank that comes late."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from lightning_dist.compat.distributed import timeout_of
from lightning_dist.doctor.process_groups import join
from lightning_dist.doctor.ranks import run_ranks
from lightning_dist.doctor.results import CheckFailed, CheckSkipped, Finding
from lightning_dist.doctor.settings import Settings
from lightning_dist.ranks import LayoutRanks

LATE = 1.5
"""Seconds that a rank comes late."""

FAULTY_TIMEOUT = timedelta(seconds=0.5)


def check_timeouts(settings: Settings, layout: str | None) -> Finding:
    """The groups of a layout, made as a strategy makes them with its default timeout."""
    if layout is None:
        raise CheckSkipped(f"{settings.num_ranks} rank waits for nobody")
    timeouts = run_ranks(settings, wait_for_late_ranks, settings, layout)
    seconds = {name: value for of_rank in timeouts for name, value in of_rank.items()}
    return Finding(
        f"{len(seconds)} groups of {layout} wait {min(seconds.values()):.0f} s or more, and {LATE:g} s for a late rank",
        {"timeouts in seconds": seconds},
    )


def wait_for_late_ranks(settings: Settings, layout: str) -> dict[str, float]:
    """On a rank: the timeouts of its groups in seconds, by name.

    Raises:
        CheckFailed: one is shorter than was asked for, or did not wait.
    """
    ranks = join(settings, layout, default_pg_timeout)
    groups = _groups(ranks)
    if settings.has_fault("short timeout"):
        short = next(name for name in groups if "pp" in name or "tp" in name)
        dist.set_timeout(FAULTY_TIMEOUT, groups[short])
    found = {name: timeout_of(group, ranks.device).total_seconds() for name, group in groups.items()}
    for name, group in groups.items():
        _be_late(name, group, ranks.device, found[name])
    asked = default_pg_timeout.total_seconds()
    for name, timeout in found.items():
        if timeout < asked:
            raise CheckFailed(
                f"the timeout of group {name} is {timeout:g} s, and {asked:g} s were asked for: a save or a slow batch "
                "that takes longer ends the run",
                {"timeouts in seconds": found},
            )
    return found


def _groups(ranks: LayoutRanks) -> dict[str, dist.ProcessGroup]:
    """Of more than one rank. One that has several names, as an axis of all ranks and the world, is there once."""
    names: dict[Any, list[str]] = {}
    for name, group in ranks.groups.items():
        if group.size() > 1:
            names.setdefault(group, []).append(name)
    return {" = ".join(of_group): group for group, of_group in names.items()}


def _be_late(name: str, group: dist.ProcessGroup, device: torch.device, timeout: float) -> None:
    if group.rank() == group.size() - 1:
        time.sleep(LATE)
    try:
        dist.all_reduce(torch.ones(1, device=device), group=group)
        if device.type != "cpu":
            torch.accelerator.synchronize()
    except RuntimeError as error:
        raise CheckFailed(
            f"group {name} did not wait {LATE:g} s for a rank that came late: its timeout is too short; HybridStrategy("
            "timeout=timedelta(minutes=30)) is what torch itself has",
            {"timeout in seconds": timeout, "rank": os.environ["RANK"], "error": str(error)},
        ) from error
