"""The steps of a dry run, run for real on this machine: what its ranks had at their peaks."""

from __future__ import annotations

import copy
import resource
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_dist.explain.dry_run import fit_steps

_KIB = 1024


class _Measure(Callback):
    """Writes what each rank had at most, into a file of its own in a folder."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device = trainer.strategy.root_device
        on_cpu = device.type == "cpu"
        peak = _highest_resident() if on_cpu else torch.accelerator.max_memory_allocated(device)
        Path(self._folder, str(trainer.global_rank)).write_text(f"{device.type} {peak}")


def measured_peak(
    make: Callable[[], pl.LightningModule],
    strategy: Any,
    num_ranks: int,
    batch: Any,
    trainer: Mapping[str, Any] | None = None,
) -> int:
    """Bytes that the rank with most had at its peak, of as many steps as a dry run's, on this machine.

    On an accelerator those that its tensors took; on the CPU resident memory, beside what this process has now, of
    which the ranks are forks.
    """
    strategy = copy.deepcopy(strategy)
    strategy.start_method = "fork"
    before = _resident_now()
    with tempfile.TemporaryDirectory() as folder:
        fit_steps(make(), batch, [_Measure(folder)], devices=num_ranks, strategy=strategy, **(trainer or {}))
        told = [file.read_text().split() for file in Path(folder).iterdir()]
    return max(int(peak) - (before if kind == "cpu" else 0) for kind, peak in told)


def _highest_resident() -> int:
    return _KIB * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _resident_now() -> int:
    """Where the system tells it, which Linux does; else the highest."""
    told = Path("/proc/self/statm")
    return int(told.read_text().split()[1]) * resource.getpagesize() if told.exists() else _highest_resident()
