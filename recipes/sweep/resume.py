"""What of an earlier start of a sweep in its directory still holds: jobs that are done, checkpoints of others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from recipes.config_errors import ConfigError
from recipes.sweep.result import NOT_ENDED, JobResult

log = logging.getLogger("recipes.train")


def done_before(cfg: DictConfig, directory: Path, overrides: Sequence[str]) -> JobResult | None:
    """The result of a job that came to its end in an earlier start of the sweep; None where it is to run.

    Args:
        cfg: of the job; with ``resume=false`` every job runs.
        directory: of the job.
        overrides: of the job.

    Raises:
        ConfigError: the directory is that of a job of other overrides, with whose checkpoints this one can't go on.
    """
    before = JobResult.of(directory) if cfg.get("resume") else None
    if before is None:
        return None
    if before.overrides != list(overrides):
        changed = [text for text in before.overrides if text not in overrides] or before.overrides
        raise ConfigError(
            f"{directory} has a job of another sweep ({', '.join(changed)}); pass another hydra.sweep.dir, or "
            "resume=false to write over it"
        )
    return before if before.error is None else None


def begin(cfg: DictConfig, directory: Path, overrides: Sequence[str], is_first_rank: bool = True) -> None:
    """A job begins, or goes on from the last checkpoint that an earlier start of it has left."""
    has_checkpoint = cfg.get("resume") and JobResult.of(directory) and any(directory.rglob("*.ckpt"))
    if has_checkpoint and cfg.train and cfg.ckpt_path is None:
        log.info("the job goes on from its last checkpoint in %s", directory)
        cfg.ckpt_path = "last"
    if is_first_rank:
        JobResult(list(overrides), NOT_ENDED, {}, cfg.optimized_metric).save(directory)
