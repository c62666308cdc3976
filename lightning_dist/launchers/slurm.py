"""Slurm: submits the ranks of a job to SLURM, by submitit.

[Note: requeue]
Before it ends a job (its time is over, another job takes its place) SLURM sends the ranks SIGUSR1. Within a run of
Lightning that is handled: it saves, asks SLURM to queue the job again, and leaves with :data:`REQUEUE_STATUS`.
Anywhere else (while modules are imported, say) the signal ends a rank, as it ends any process that does not handle it.
srun gives the batch script both statuses, whatever became of the ranks: so the script asks as well.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_dist.elastic.signals import REQUEUE_STATUS

WARNING = signal.SIGUSR1
"""What Lightning waits for as well; submitit's own default is SIGUSR2."""

MOST_SET_UPS = 10
"""How often a job is queued again whose ranks were warned before they trained: with too little time they never do."""

LAST_RANK_SECONDS = 60
"""How long the last rank of a job may go on after the first has ended."""


@dataclass(frozen=True)
class Slurm:
    """What a job asks SLURM for.

    Attributes:
        folder: where submitit keeps what it sends and gets back, and each rank's output; all machines see it.
        num_nodes: machines.
        ranks_per_node: tasks on each of them, each a rank.
        name: of the job, as ``squeue`` shows it.
        minutes: after which SLURM ends it.
        gpus_per_node: of which each rank sees all, and takes the one of its local rank.
        cpus_per_rank: for the rank and its loader's workers; None: what the cluster gives.
        memory_per_node: in GB; None: what the cluster gives.
        warning: seconds before its end in which the ranks are told (``SIGUSR1``); see [Note: requeue].
        requeue: whether the job is queued again after that, and after the failure of a machine.
        options: more of ``sbatch``, by their names there: ``{"partition": "a100", "account": "me"}``.
        setup: lines of shell before the ranks start, such as ``module load cuda``.
    """

    folder: str | Path
    num_nodes: int
    ranks_per_node: int
    name: str = "lightning_dist"
    minutes: int = 60
    gpus_per_node: int = 0
    cpus_per_rank: int | None = None
    memory_per_node: float | None = None
    warning: int = 90
    requeue: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    setup: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.name in ("bash", "interactive"):
            raise ValueError(f"a job of the name {self.name} is a shell to Lightning, which would start ranks in it")

    def submit(self, worker: Callable[..., Any], *args: Any) -> Any:
        """Queues a job whose ranks each call ``worker(*args)``, and returns at once.

        The ranks find themselves as tasks of SLURM (``SLURM_PROCID``, ``SLURM_NTASKS``), which Lightning joins. A job
        that is queued again calls it again, with ``SLURM_RESTART_COUNT`` above 0.

        Args:
            worker: a function that can be imported by its module and name.
            args: its arguments; they and the result are pickled.

        Returns:
            submitit's job: its ``job_id``, and ``results()``, which waits for what the ranks return.

        Raises:
            ValueError: submitit is missing, or this machine can't submit.
        """
        try:
            import submitit
        except ImportError:
            raise ValueError("SLURM is reached by submitit; pip install 'lightning_dist[slurm]'") from None
        if missing := [name for name in ("sbatch", "srun") if shutil.which(name) is None]:
            raise ValueError(f"there is no {missing[0]} on this machine; submit from a login node of the cluster")
        executor = submitit.AutoExecutor(self.folder, cluster="slurm")
        executor.update_parameters(**self._parameters())
        return executor.submit(worker, *args)

    def _parameters(self) -> dict[str, Any]:
        wanted = {
            "name": self.name,
            "timeout_min": self.minutes,
            "nodes": self.num_nodes,
            "tasks_per_node": self.ranks_per_node,
            "gpus_per_node": self.gpus_per_node or None,
            "cpus_per_task": self.cpus_per_rank,
            "mem_gb": self.memory_per_node,
        }
        # submitit's would be its own signal, and whether SLURM may requeue the cluster's default
        of_sbatch = {
            "signal": f"{WARNING.name.removeprefix('SIG')}@{self.warning}",
            "requeue" if self.requeue else "no-requeue": True,
            **self.options,
        }
        return {name: value for name, value in wanted.items() if value is not None} | {
            "slurm_additional_parameters": of_sbatch,
            "slurm_setup": list(self.setup) or None,
            # Ranks leave one after the other, each with its status; those that wait for one that is gone are ended.
            "slurm_srun_args": ["--kill-on-bad-exit=0", f"--wait={LAST_RANK_SECONDS}"],
            "slurm_teardown": self._requeue_if_asked(),
        }

    def _requeue_if_asked(self) -> list[str]:
        """Lines of the batch script after srun; see [Note: requeue]."""
        is_in_set_up = f'[ $status -eq {128 + WARNING} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {MOST_SET_UPS} ]'
        request = [
            f"if [ $status -eq {REQUEUE_STATUS} ] || {{ {is_in_set_up}; }}; then",
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
        ]
        return ["status=$?", *(request if self.requeue else []), "exit $status"]
