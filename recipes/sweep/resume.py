"""What of an earlier start of a sweep in its directory still holds: jobs that are done, checkpoints of others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from recipes.config_errors import ConfigError
from recipes.sweep.result import NOT_ENDED, RESULT, JobResult
from recipes.sweep.running import refuse_handed_on

log = logging.getLogger("recipes.train")


def done_before(cfg: DictConfig, directory: Path, overrides: Sequence[str]) -> JobResult | None:
    """The result of a job that came to its end in an earlier start of the sweep; None where it is to run.

    Args:
        cfg: of the job; with ``resume=false`` every job runs.
        directory: of the job.
        overrides: of the job.

    Raises:
        ConfigError: the directory is that of a job of other overrides, with whose checkpoints this one can't go on, or
            of one that was handed on and has not ended.
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
    if before.error == NOT_ENDED:
        refuse_handed_on(directory)
    return before if before.error is None else None


def goes_on(cfg: DictConfig, directory: Path) -> bool:
    """Whether a job that SLURM or Ray starts was started before, and left a checkpoint to go on from.

    With ``resume=false`` that is one that was written since the job was handed on, not one of an earlier sweep.
    """
    result = directory / RESULT
    since = result.stat().st_mtime if not cfg.get("resume") and result.is_file() else 0.0
    return any(file.stat().st_mtime >= since for file in directory.rglob("*.ckpt"))


def begin(cfg: DictConfig, directory: Path, overrides: Sequence[str], is_first_rank: bool = True) -> None:
    """A job begins, or goes on from the last checkpoint that an earlier start of it has left."""
    has_checkpoint = cfg.get("resume") and JobResult.of(directory) and any(directory.rglob("*.ckpt"))
    if has_checkpoint and cfg.train and cfg.ckpt_path is None:
        log.info("the job goes on from its last checkpoint in %s", directory)
        cfg.ckpt_path = "last"
    if is_first_rank:
        JobResult(list(overrides), NOT_ENDED, {}, cfg.optimized_metric).save(directory)
