"""``hydra/launcher=slots``: the jobs of a sweep side by side. Hydra imports this at each start: it imports little."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from recipes.overrides import task_overrides
from recipes.sweep.job_process import start_method

log = logging.getLogger(__name__)


class SlotsLauncher(Launcher):
    """Runs jobs on this machine side by side, each in a process of its own.

    Args:
        slots: jobs at once, at most; None: as many as the machine has a device, or a core, for each of their ranks.
    """

    def __init__(self, slots: int | None = None) -> None:
        if slots is not None and slots < 1:
            raise ValueError(f"hydra.launcher.slots={slots}: pass how many jobs may run at once")
        self.slots = slots

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keeps what jobs are made of, and has their imports begin while Hydra composes them."""
        self.context, self.task, self.config = hydra_context, task_function, config
        from recipes import fork_server

        if start_method(config) == "forkserver":
            fork_server.start(config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs these jobs, and returns what they did in the same order."""
        returns: dict[int, JobReturn] = {}
        numbered = enumerate(job_overrides, start=initial_job_idx)
        self.launch_each(numbered, lambda number, returned: returns.update({number: returned}), look_ahead=True)
        return [returns[number] for number in sorted(returns)]

    def launch_each(
        self,
        jobs: Iterable[tuple[int, Sequence[str]]],
        ended: Callable[[int, JobReturn], None],
        look_ahead: bool = False,
    ) -> None:
        """Runs jobs, each of which is asked for when there is a slot for it, and tells of each when it has ended.

        Args:
            jobs: numbers, and the overrides of each.
            ended: is told the number, and what the job returned.
            look_ahead: whether to ask for further jobs while one waits.
        """
        from recipes import targets
        from recipes.sweep.machine import Machine
        from recipes.sweep.resume import done_before
        from recipes.sweep.running import refuse_running
        from recipes.sweep.slots import SlotJob, Slots

        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)

        def to_run() -> Iterator[SlotJob]:
            for number, overrides in jobs:
                job = self._job(number, list(overrides), SlotJob)
                done = done_before(job.config, job.directory, task_overrides(job.config.hydra))
                if done is None:
                    refuse_running(job.directory)
                    yield job
                else:
                    log.info("#%d was done before, by an earlier start of this sweep", number)
                    ended(number, _returned(job.config, job.directory))

        machine = Machine.here(self.slots, with_accelerators=self._uses_accelerators())
        slots = Slots(machine, targets.allowed())
        slots.run(to_run(), lambda job: ended(job.number, _returned(job.config, job.directory)), look_ahead)

    def _job(self, number: int, overrides: list[str], kind: Any) -> Any:
        config = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        # as Hydra does where it runs a job
        from hydra.core.hydra_config import HydraConfig

        before = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(config)
        directory = Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)
        HydraConfig.instance().cfg = before
        shown = list(filter_overrides(overrides))
        return kind(number, config, directory.absolute(), shown, (self.task.__module__, self.task.__name__))

    def _uses_accelerators(self) -> bool:
        return OmegaConf.select(self.config, "trainer.accelerator") != "cpu"


def _returned(config: DictConfig, directory: Path) -> JobReturn:
    """What a job has returned, by what it has left."""
    from recipes.sweep.result import JobResult

    result = JobResult.of(directory)
    value: float | None = math.nan
    if result is not None and result.error is None:
        name = config.optimized_metric
        value = None if name is None else result.metrics.get(name, math.nan)
    overrides = task_overrides(config.hydra)
    returned = JobReturn(overrides=overrides, cfg=config, working_dir=str(directory), status=JobStatus.COMPLETED)
    returned.return_value = value
    return returned
