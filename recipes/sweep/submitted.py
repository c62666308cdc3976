"""Jobs that Hydra's plugin has submitit run: one that was killed is a failed job, not the end of the sweep."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from recipes.sweep.result import NOT_ENDED, JobResult

log = logging.getLogger("recipes.train")


def is_by_submitit(config: DictConfig) -> bool:
    """Whether the launcher of a sweep is one of the plugin ``hydra-submitit-launcher``."""
    return "submitit" in str(OmegaConf.select(config, "hydra.launcher._target_"))


def survive_killed_jobs(sweep: Path) -> None:
    """From here on the launcher, which asks one job after the other how it went, gets an answer of each.

    submitit raises for a job whose process was killed (memory, time), or that ended itself without a result, so that
    Hydra would wait for no other (seen in submitit 1.5.4 and hydra-submitit-launcher 1.2.0).
    """
    from submitit import Job
    from submitit.core.utils import FailedJobError, UncompletedJobError

    results = Job.results

    def results_or_failure(job: Any) -> list[Any]:
        try:
            return results(job)
        except (FailedJobError, UncompletedJobError):
            return [_failure(sweep, job)]

    Job.results = results_or_failure  # type: ignore[assignment, method-assign]


def _failure(sweep: Path, job: Any) -> JobReturn:
    """What is returned for a job that said nothing itself; its reason is left in its directory."""
    overrides, _, number, *_ = job.submission().args
    directory = _directory(sweep, number)
    before = JobResult.of(directory)
    if before is None or before.error == NOT_ENDED:
        told = f"job {job.job_id} was ended ({job.state}); what it told is in {job.paths.stderr}"
        JobResult([str(override) for override in overrides], told, {}).save(directory)
        log.error("job %s failed: %s", number, told)
    returned = JobReturn(overrides=list(overrides), working_dir=str(directory), status=JobStatus.COMPLETED)
    returned.return_value = math.nan
    return returned


def _directory(sweep: Path, number: int) -> Path:
    """That of a job, by its number in the sweep."""
    for file in sweep.rglob(".hydra/hydra.yaml"):
        if OmegaConf.select(OmegaConf.load(file), "hydra.job.num") == number:
            return file.parent.parent
    return sweep / str(number)  # it never began
