"""A job that asks its scheduler to start it again."""

from __future__ import annotations

import logging
import os
import subprocess

log = logging.getLogger(__name__)


def requeue_slurm_job() -> None:
    """Asks SLURM to queue this job again, as Lightning does; one process of the job calls it. Where that fails, it is
    said in the log: the status of the processes asks for the same.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = os.environ.get("SLURM_JOB_ID") if array is None else f"{array}_{task}"
    if job is None:
        return
    try:
        asked = subprocess.run(["scontrol", "requeue", job], check=False, capture_output=True, text=True)
    except OSError as error:
        log.warning("SLURM job %s could not be queued again: %s", job, error)
        return
    if asked.returncode:
        log.warning("SLURM job %s could not be queued again: scontrol said %s", job, asked.stderr.strip())
