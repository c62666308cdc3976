"""What an experiment of ``conf/experiment`` says of itself: what it should reach, and how it is shown that it does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipes import targets
from recipes.config_errors import did_you_mean, explain

CONF = Path(__file__).resolve().parent.parent / "conf"

Point = tuple[tuple[str, Any], ...]
"""A value for each key that an experiment is repeated over."""


@dataclass(frozen=True)
class Band:
    """Where a metric should lie; ``expected`` of a config.

    Args:
        metric: by the name that it is logged under.
        at_least: the lower end, None for none.
        at_most: the upper end, None for none.
    """

    metric: str
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a value lies within; what is not a number does not."""
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        ends = ("at least", self.at_least), ("at most", self.at_most)
        return " and ".join(f"{word} {end:g}" for word, end in ends if end is not None)


@dataclass(frozen=True)
class Reproduction:
    """How an experiment is run to see that it reproduces; ``reproduce`` of a config.

    Args:
        layouts: such as ``"dp_shard=2"``, each with overrides of its own behind it where it needs some:
            ``"pp=2 strategy.num_microbatches=1"``.
        seeds: with each of which every layout runs.
        over: values by key, such as folds; the mean over them is what has to lie in the band.
        beside: what to show beside the metric, by name: another metric that the run logs, or a number.
        layouts_within: how far the metrics of layouts may be apart with the same seed. None where a layout draws other
            random numbers, as dropout does.
    """

    layouts: Sequence[str]
    seeds: Sequence[int]
    over: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    beside: Mapping[str, str | float] = field(default_factory=dict)
    layouts_within: float | None = None

    def points(self) -> Iterator[Point]:
        """Each combination of :attr:`over`; one without keys where there is none."""
        return (tuple(zip(self.over, values, strict=True)) for values in itertools.product(*self.over.values()))


@dataclass(frozen=True)
class Experiment:
    """An experiment by its name.

    Args:
        name: of its file.
        about: the first line of its file.
        cfg: as composed.
        band: None if it says nothing.
        reproduction: None if it is only composed and explained.
    """

    name: str
    about: str
    cfg: DictConfig
    band: Band | None
    reproduction: Reproduction | None

    @classmethod
    def read(cls, name: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> Experiment:
        """Composes an experiment.

        Raises:
            ValueError: there is none of this name, or its file or an override says what can't be.
        """
        files = experiment_files(config_dir)
        if name not in files:
            raise ValueError(f"there is no experiment {name!r} in conf/experiment{did_you_mean(name, files)}")
        searched = [] if config_dir is None else [f"hydra.searchpath=[file://{config_dir.resolve()}]"]
        try:
            with initialize_config_dir(str(CONF), **targets.VERSION_BASE):
                cfg = compose("config", [f"experiment={name}", *overrides, *searched])
        except (CompactHydraException, OmegaConfBaseException) as error:
            raise ValueError(f"{name}: {explain(error)}") from None
        band = _read(Band, cfg.expected, f"{name}: expected")
        reproduction = _read(Reproduction, cfg.get("reproduce"), f"{name}: reproduce")
        return cls(name, _about(files[name]), cfg, band, reproduction)

    def with_runs(self, layouts: Sequence[str], seeds: Sequence[int]) -> Experiment:
        """The same with other layouts and seeds, where any are given; each once, however often it is named."""
        assert self.reproduction is not None
        own = self.reproduction
        changes: dict[str, Any] = {"layouts": layouts or own.layouts, "seeds": seeds or own.seeds}
        once: dict[str, Any] = {name: list(dict.fromkeys(values)) for name, values in changes.items()}
        return replace(self, reproduction=replace(own, **once))


def experiment_files(config_dir: Path | None = None) -> dict[str, Path]:
    """The files of all experiments by name, those of another directory of configs included."""
    folders = [CONF, *([] if config_dir is None else [config_dir])]
    return {file.stem: file for folder in folders for file in sorted((folder / "experiment").glob("*.yaml"))}


def _read(kind: type[Any], node: DictConfig | None, what: str) -> Any:
    if node is None:
        return None
    values: Any = OmegaConf.to_container(node, resolve=True)
    for name in values:
        if name not in kind.__dataclass_fields__:
            raise ValueError(f"{what} has no {name!r}{did_you_mean(name, kind.__dataclass_fields__)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from None


def _about(file: Path) -> str:
    lines = (line.lstrip("# ").rstrip() for line in file.read_text().splitlines())
    return next((line for line in lines if line and not line.startswith("@package")), "")
