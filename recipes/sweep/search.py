"""A search by Optuna: what is tried next hangs on how the jobs before it ended.

Hydra's own plugin for it (hydra-optuna-sweeper 1.3) needs an Optuna below 3, so this asks and tells itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override

from recipes.config_errors import ConfigError, did_you_mean

JOURNAL = "optuna.journal"
"""Where a study is kept, in the directory of its sweep, unless a storage is named."""


def import_optuna() -> Any:
    """Optuna; a ConfigError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise ConfigError("hydra/sweeper=optuna needs Optuna: pip install 'lightning_dist[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def search_space(overrides: Sequence[Override]) -> tuple[dict[str, Any], list[str]]:
    """The distributions of keys that are searched, by key, and the overrides of all jobs.

    ``a,b`` and ``choice`` are one of several, whatever they name (a group, a layout); ``range`` a number with a step,
    ``interval(low, high)`` any number between, ``tag(log, interval(low, high))`` by its logarithm,
    ``int(interval(low, high))`` a whole one.
    """
    space, fixed = dict[str, Any](), list[str]()
    for override in overrides:
        key = override.get_key_element()
        if override.is_sweep_override():
            space[key] = _distribution(override)
        else:
            fixed.append(f"{key}={override.get_value_element_as_str()}" if not override.is_delete() else key)
    if not space:
        raise ConfigError(
            "hydra/sweeper=optuna has nothing to search; give a key several values: optimizer.lr='interval(1e-4, 1e-1)'"
        )
    return space, fixed


def _distribution(override: Override) -> Any:
    distributions = import_optuna().distributions
    if override.is_interval_sweep():
        value = override.value()
        assert isinstance(value, IntervalSweep)
        is_whole = isinstance(value.start, int) and isinstance(value.end, int)
        kind = distributions.IntDistribution if is_whole else distributions.FloatDistribution
        return kind(value.start, value.end, log="log" in value.tags)
    values = list(override.sweep_string_iterator())
    if override.is_range_sweep() and len(values) > 1:
        numbers = sorted(float(value) for value in values)
        low, high, step = numbers[0], numbers[-1], numbers[1] - numbers[0]
        if all(number.is_integer() for number in numbers):
            return distributions.IntDistribution(int(low), int(high), step=int(step))
        return distributions.FloatDistribution(low, high, step=step)
    return distributions.CategoricalDistribution(values)


class Search:
    """A study, kept in a file or a database, so that a search that was ended goes on.

    Args:
        directory: of the sweep.
        space, fixed: what :func:`search_space` gives.
        num_trials: jobs in all, those of an earlier start included.
        is_maximized: whether more of the metric is better.
        sampler, options: the name of a sampler of Optuna's, and its arguments.
        storage: the URL of a database; None for a file in the directory.
        name: of the study in the storage.

    Raises:
        ConfigError: there is no such sampler.
    """

    def __init__(
        self,
        directory: Path,
        space: dict[str, Any],
        fixed: list[str],
        *,
        num_trials: int,
        is_maximized: bool,
        sampler: str,
        options: dict[str, Any],
        storage: str | None,
        name: str | None,
    ) -> None:
        optuna = import_optuna()
        self._space, self._fixed, self._num_trials = space, fixed, num_trials
        self._states = optuna.trial.TrialState
        if not hasattr(optuna.samplers, sampler):
            names = [known for known in optuna.samplers.__all__ if known.endswith("Sampler")]
            raise ConfigError(f"hydra.sweeper.sampler={sampler} is none of Optuna's{did_you_mean(sampler, names)}")
        journal = optuna.storages.journal
        self.study = optuna.create_study(
            study_name=name or "sweep",
            storage=storage or journal.JournalStorage(journal.JournalFileBackend(str(directory / JOURNAL))),
            sampler=getattr(optuna.samplers, sampler)(**options),
            direction="maximize" if is_maximized else "minimize",
            load_if_exists=True,
        )

    def jobs(self) -> Iterator[tuple[int, list[str]]]:
        """Numbers and overrides of the jobs to run: first those that an earlier start of the search did not finish,
        then new ones, each chosen when it is asked for.
        """
        trials = self.study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state == self._states.RUNNING:
                yield trial.number, self._overrides(trial.params)
        for _ in range(self._num_trials - len(trials)):
            asked = self.study.ask(self._space)
            yield asked.number, self._overrides(asked.params)

    def tell(self, number: int, value: Any) -> None:
        """How a job ended: its metric, or none or no number where it failed."""
        if value is None or not math.isfinite(value):
            self.study.tell(number, state=self._states.FAIL)
        else:
            self.study.tell(number, value)

    def best(self) -> dict[str, Any] | None:
        """Parameters and value of the best trial; None where none came to its end."""
        done = self.study.get_trials(states=(self._states.COMPLETE,))
        if not done:
            return None
        return {"name": "optuna", "best_params": self.study.best_params, "best_value": self.study.best_value}

    def _overrides(self, parameters: dict[str, Any]) -> list[str]:
        return [*self._fixed, *(f"{key}={parameters[key]}" for key in self._space)]
