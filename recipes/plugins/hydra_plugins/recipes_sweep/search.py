"""``hydra/sweeper=optuna``: a sweep that searches. Hydra imports this at each start, so it imports little."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import CompactHydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

log = logging.getLogger("recipes.train")


class OptunaSweeper(Sweeper):
    """Asks Optuna for the overrides of each job, and tells it what the job reached, or that it failed.

    Args: see ``conf/hydra/sweeper/optuna.yaml``.
    """

    def __init__(
        self,
        n_trials: int,
        n_jobs: int,
        direction: str | None,
        sampler: str,
        sampler_options: DictConfig,
        storage: str | None,
        study_name: str | None,
        params: DictConfig | None,
    ) -> None:
        self.num_trials, self.num_jobs, self.direction = n_trials, n_jobs, direction
        self.sampler = sampler
        self.options: dict[str, Any] = {str(name): value for name, value in sampler_options.items()}
        self.storage, self.name, self.params = storage, study_name, params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keeps what jobs are made of, and makes their launcher."""
        self.context = hydra_context
        self.master: DictConfig = config
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Searches to the end, and writes the best parameters to ``optimization_results.yaml``."""
        from recipes.sweep.search import Search, search_space

        parser = OverridesParser.create(config_loader=self.context.config_loader)
        asked = [f"{key!s}={value}" for key, value in (self.params or {}).items()]
        space, fixed = search_space(parser.parse_overrides([*asked, *arguments]))
        metric, is_maximized = self._metric(fixed)
        directory = Path(self.master.hydra.sweep.dir)
        directory.mkdir(parents=True, exist_ok=True)
        search = Search(
            directory,
            space,
            [*fixed, f"optimized_metric={metric}"],
            num_trials=self.num_trials,
            is_maximized=is_maximized,
            sampler=self.sampler,
            options=self.options,
            storage=self.storage,
            name=self.name,
        )
        OmegaConf.save(self.master, directory / "multirun.yaml")
        self._run(search)
        if (best := search.best()) is not None:
            OmegaConf.save(OmegaConf.create(best), directory / "optimization_results.yaml")

    def _metric(self, fixed: list[str]) -> tuple[str, bool]:
        """The recipe's metric, and whether more of it is better."""
        from recipes.config_errors import ConfigError
        from recipes.sweep.metric import metric_of

        metric = metric_of(self.context.config_loader.load_sweep_config(self.master, fixed))
        if metric is None:
            raise ConfigError("hydra/sweeper=optuna needs a metric; pass optimized_metric=NAME, such as val/loss")
        if self.direction not in (None, "minimize", "maximize"):
            raise ConfigError(f"hydra.sweeper.direction={self.direction}; pass minimize or maximize")
        return metric.name, metric.is_maximized if self.direction is None else self.direction == "maximize"

    def _run(self, search: Any) -> None:
        def ended(number: int, returned: Any) -> None:
            search.tell(number, returned.return_value)

        if hasattr(self.launcher, "launch_each"):
            self.launcher.launch_each(self._composed(search), ended)
            return
        batch: list[tuple[int, Sequence[str]]] = []
        for number, overrides in self._composed(search):
            if batch and (len(batch) == self.num_jobs or number != batch[-1][0] + 1):
                self._launch(batch, ended)
                batch = []
            batch.append((number, overrides))
            if len(batch) == self.num_jobs:
                self._launch(batch, ended)
                batch = []
        if batch:
            self._launch(batch, ended)

    def _composed(self, search: Any) -> Iterator[tuple[int, list[str]]]:
        """The jobs whose configs compose; the others have failed, and the search knows it."""
        from recipes.config_errors import explain
        from recipes.sweep.result import JobResult

        for number, overrides in search.jobs():
            try:
                self.context.config_loader.load_sweep_config(self.master, list(overrides))
            except (CompactHydraException, OmegaConfBaseException) as error:
                told = explain(error)
                log.error("job %d failed: %s", number, told)
                directory = Path(self.master.hydra.sweep.dir, str(number))
                JobResult(list(overrides), told.splitlines()[0], {}).save(directory)
                search.tell(number, None)
            else:
                yield number, overrides

    def _launch(self, batch: list[tuple[int, Sequence[str]]], ended: Any) -> None:
        returned = self.launcher.launch([overrides for _, overrides in batch], initial_job_idx=batch[0][0])
        for (number, _), one in zip(batch, returned, strict=True):
            ended(number, one)
