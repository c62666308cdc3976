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

ASKED, PLACE, EXHAUSTED = "asked", "directory", "exhausted"
"""What a study keeps of its search, a trial of the sweep that runs it, and a study when no point is left to try."""

KEEP_THEIR_PLACE = ("GridSampler", "QMCSampler")
"""Samplers that go on in a sequence that hangs on the seed, wherever a study was left."""


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
        num_trials: jobs in all, those of an earlier start and of other processes of the study included.
        is_maximized: whether more of the metric is better.
        sampler, options: the name of a sampler of Optuna's, and its arguments.
        storage: the URL of a database; None for a file in the directory.
        name: of the study in the storage.

    Raises:
        ConfigError: there is no such sampler, a storage without a name, or the study is that of another search.
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
        self._place, self._is_of_one_directory = str(directory.absolute()), storage is None
        if not hasattr(optuna.samplers, sampler):
            names = [known for known in optuna.samplers.__all__ if known.endswith("Sampler")]
            raise ConfigError(f"hydra.sweeper.sampler={sampler} is none of Optuna's{did_you_mean(sampler, names)}")
        if storage is not None and name is None:
            raise ConfigError(
                f"hydra.sweeper.storage={storage} may hold several searches; pass hydra.sweeper.study_name=NAME too"
            )
        journal = optuna.storages.journal
        direction = "maximize" if is_maximized else "minimize"
        self.study = optuna.create_study(
            study_name=name or "sweep",
            storage=storage or journal.JournalStorage(journal.JournalFileBackend(str(directory / JOURNAL))),
            direction=direction,
            load_if_exists=True,
        )
        self._refuse_another(direction)
        self.study.sampler = getattr(optuna.samplers, sampler)(**self._seeded(sampler, options))

    def _refuse_another(self, direction: str) -> None:
        """Raises a ConfigError where the study was begun with other overrides, values to search or direction."""
        written = import_optuna().distributions.distribution_to_json
        asked = [
            f"direction {direction}",
            *(text for text in self._fixed if text.partition("=")[0].lstrip("+") != "resume"),
            *(f"{key}: {written(distribution)}" for key, distribution in sorted(self._space.items())),
        ]
        found = [f"direction {self.study.direction.name.lower()}"]
        before = self.study.user_attrs.get(ASKED, found + asked[1:])
        if found[0] == asked[0] and before == asked:
            self.study.set_user_attr(ASKED, asked)
            return
        changed = [text for text in before if text not in asked] or before
        where = self._place if self._is_of_one_directory else f"the study {self.study.study_name}"
        other = "hydra.sweep.dir" if self._is_of_one_directory else "hydra.sweeper.study_name"
        raise ConfigError(f"{where} has a search that was begun otherwise ({', '.join(changed)}); pass another {other}")

    def _seeded(self, sampler: str, options: dict[str, Any]) -> dict[str, Any]:
        """The options of the sampler, with another seed where trials are there, whose points it would try again."""
        seed = options.get("seed")
        if not isinstance(seed, int) or sampler in KEEP_THEIR_PLACE:
            return options
        return options | {"seed": seed + len(self.study.get_trials(deepcopy=False))}

    def jobs(self) -> Iterator[tuple[int, list[str]]]:
        """Numbers and overrides of the jobs to run: first those that an earlier start of the search in this directory
        did not finish, then new ones, each chosen when it is asked for.
        """
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state == self._states.RUNNING and self._is_own(trial):
                yield trial.number, self._overrides(trial.params)
        while len(self.study.get_trials(deepcopy=False)) < self._num_trials and not self._is_exhausted:
            asked = self.study.ask(self._space)
            asked.set_user_attr(PLACE, self._place)
            yield asked.number, self._overrides(asked.params)

    def _is_own(self, trial: Any) -> bool:
        """Others may search in the same study, and run theirs."""
        return trial.user_attrs.get(PLACE, self._place if self._is_of_one_directory else None) == self._place

    @property
    def _is_exhausted(self) -> bool:
        return bool(self.study.user_attrs.get(EXHAUSTED))

    def tell(self, number: int, value: Any) -> None:
        """How a job ended: its metric, or none or no number where it failed."""
        try:
            if value is None or not math.isfinite(value):
                self.study.tell(number, state=self._states.FAIL, skip_if_finished=True)
            else:
                self.study.tell(number, value, skip_if_finished=True)
        except RuntimeError as error:
            # a sampler of finitely many points has tried them all, and the trial is stored (seen in Optuna 5.0)
            if "Study.stop" not in str(error):
                raise
            self.study.set_user_attr(EXHAUSTED, True)

    def best(self) -> dict[str, Any] | None:
        """Parameters and value of the best trial; None where none came to its end."""
        done = self.study.get_trials(states=(self._states.COMPLETE,))
        if not done:
            return None
        return {"name": "optuna", "best_params": self.study.best_params, "best_value": self.study.best_value}

    def _overrides(self, parameters: dict[str, Any]) -> list[str]:
        return [*self._fixed, *(f"{key}={parameters[key]}" for key in self._space)]
