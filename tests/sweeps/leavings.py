"""What jobs of a sweep leave in their directories, written without running any."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf
from torch.utils.tensorboard import SummaryWriter

from recipes.sweep.result import JobResult

CONFIG = {"callbacks": {"checkpoint": {"monitor": "val/loss", "mode": "min"}}, "optimized_metric": None}


def leave_job(
    sweep: Path,
    name: str | int,
    overrides: Sequence[str],
    loss: float | None = None,
    error: str | None = None,
    curve: Sequence[float] = (),
    config: dict | None = None,
) -> Path:
    """A job that ended with this loss, or this error, and whose validation loss came down by this curve: a value every
    10 steps, and every 2 seconds.
    """
    directory = sweep / str(name)
    (directory / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(list(overrides)), directory / ".hydra" / "overrides.yaml")
    OmegaConf.save(OmegaConf.create(config or CONFIG), directory / ".hydra" / "config.yaml")
    metrics = {} if loss is None else {"val/loss": loss, "test/loss": loss + 1, "seconds": 2.0 * len(curve)}
    JobResult(list(overrides), error, metrics).save(directory)
    if curve:
        leave_curve(directory, curve)
    return directory


def leave_curve(directory: Path, curve: Sequence[float], first_step: int = 0) -> None:
    writer = SummaryWriter(directory / "tensorboard", filename_suffix=f".{first_step}")
    began = time.time()
    for index, value in enumerate(curve):
        writer.add_scalar("val/loss", value, first_step + 10 * index, walltime=began + 2 * index)
    writer.close()


def leave_grid(sweep: Path, rates: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1)) -> Path:
    """Learning rates by layouts: 0.01 is the best rate, the layout decides nothing, one job failed, one exploded."""
    layouts = "{dp_shard:2}", "{tp:2}", "{dp_replicate:2}"
    for job, (rate, layout) in enumerate((rate, layout) for rate in rates for layout in layouts):
        given = "experiment=probe", f"optimizer.lr={rate}", f"+strategy.layout={layout}"
        loss = abs(math.log10(rate) + 2) + 0.001 * job
        if job == 4:
            leave_job(sweep, job, given, error="rank 1 failed: ArithmeticError: <on purpose> & quickly", curve=[3, 2])
        else:
            end = math.nan if job == 9 else loss
            leave_job(sweep, job, given, end, curve=[loss + 2, loss + 1, math.nan if job == 9 else loss + 0.5, end])
    return sweep
