"""What the expert did, to learn from, and the episodes to be scored in, second by second."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from recipes.driving.highway import FIGURES, Fleet, Highway
from recipes.driving.recording import Recording, record
from recipes.parts import PartsData

DIRECTORY = "~/.cache/lightning_dist/driving"


class Decisions(Dataset[dict[str, Tensor]]):
    """Seconds of the expert: ``grid``, ``vehicles``, and ``action``.

    Args:
        grids, vehicles: what it saw, ``(count, 4, length, width)`` and ``(count, num_seen, 5)``.
        actions: ``(count,)``, int64.
    """

    def __init__(self, grids: Tensor, vehicles: Tensor, actions: Tensor) -> None:
        self.grids, self.vehicles, self.actions = grids, vehicles, actions

    def __len__(self) -> int:
        return len(self.actions)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"grid": self.grids[index], "vehicles": self.vehicles[index], "action": self.actions[index]}


class Seconds(Dataset[dict[str, Tensor]]):
    """Each second of each episode to drive, ``seed`` and ``second``, by the index ``second * len(seeds) + episode``.

    Args:
        seeds: of the episodes.
        duration: of each, in seconds.
    """

    def __init__(self, seeds: Sequence[int], duration: int) -> None:
        self.seeds, self.duration = list(seeds), duration

    def __len__(self) -> int:
        return self.duration * len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        second, episode = divmod(index, len(self.seeds))
        return {"seed": torch.tensor(self.seeds[episode]), "second": torch.tensor(second)}


class SecondBySecond(Sampler[list[int]]):
    """Batches of :class:`Seconds`: the first second of all groups of episodes, then the second one, and so on.

    A strategy deals batches to data ranks in turn. With a multiple of their number of groups, each has its own ones.

    Args:
        seconds: of the episodes.
        batch_size: most episodes of a group.
        num_data_ranks: that share the groups.

    Raises:
        ValueError: there are fewer episodes than data ranks.
    """

    def __init__(self, seconds: Seconds, batch_size: int, num_data_ranks: int) -> None:
        num_episodes = len(seconds.seeds)
        if num_episodes < num_data_ranks:
            raise ValueError(
                f"{num_episodes} episodes to test on can't be dealt to {num_data_ranks} data ranks (dp_replicate x "
                "dp_shard); pass a longer range as data.test_seeds, or choose a layout with fewer"
            )
        rounds = -(-num_episodes // (batch_size * num_data_ranks))
        num_groups = min(rounds * num_data_ranks, num_episodes // num_data_ranks * num_data_ranks)
        self.groups = [group.tolist() for group in np.array_split(np.arange(num_episodes), num_groups)]
        self.num_episodes, self.duration = num_episodes, seconds.duration

    def __len__(self) -> int:
        return self.duration * len(self.groups)

    def __iter__(self) -> Iterator[list[int]]:
        for second in range(self.duration):
            for group in self.groups:
                yield [second * self.num_episodes + episode for episode in group]


class DrivingData(PartsData):
    """Seconds of an expert to learn from, recorded once, and episodes of unseen seeds to be scored in.

    Args:
        highway: on which.
        train_seeds, val_seeds, test_seeds: begin and end of ranges of seeds, each an episode.
        noise: see :class:`~recipes.driving.recording.Recording`.
        directory: for the recording; its name tells what is recorded, so that another one is another file.
        num_processes: that record; by default one for each core that this process may use.
        batch_size: seconds of the expert per process and step.
        eval_batch_size: seconds, or episodes of the test, per process and batch, by default ``batch_size``.
        num_workers: processes that read ahead.

    Raises:
        ValueError: what the config says of the recording can't be.
    """

    def __init__(
        self,
        highway: Highway,
        train_seeds: Sequence[int],
        val_seeds: Sequence[int],
        test_seeds: Sequence[int],
        noise: float = 0.0,
        directory: str | Path = DIRECTORY,
        num_processes: int | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, eval_batch_size)
        ranges: dict[str, Any] = {"train_seeds": train_seeds, "val_seeds": val_seeds, "test_seeds": test_seeds}
        self.recording = Recording(highway, noise=noise, **{name: _ends(name, ends) for name, ends in ranges.items()})
        self.directory = Path(directory).expanduser()
        self.num_processes = num_processes or len(os.sched_getaffinity(0))
        self.fleet = Fleet(highway)
        self.references: dict[str, dict[str, float]] = {}
        """The mean figures of other drivers on the episodes of the test, by their names; there after ``setup``."""

    def prepare_data(self) -> None:
        """Records what was not recorded yet, on one process per node.

        Raises:
            ImportError: highway-env is not installed.
        """
        self.recording.highway.check_installed()
        file = self.recording.file(self.directory)
        if not file.is_file():
            record(self.recording, file, self.num_processes)

    def setup(self, stage: str) -> None:
        """Reads the recording."""
        if self.parts:
            return
        with np.load(self.recording.file(self.directory)) as file:
            arrays = dict(file)
        for part in ("train", "val"):
            columns = (torch.from_numpy(arrays[f"{part}_{name}"]) for name in ("grid", "vehicles", "actions"))
            self.parts[part] = Decisions(*columns)
        self.parts["test"] = Seconds(range(*self.recording.test_seeds), self.recording.highway.duration)
        for name, figures in arrays.items():
            if name.endswith("_figures"):
                means = dict(zip(FIGURES, figures.mean(0).tolist(), strict=True))
                self.references[name.removesuffix("_figures")] = means

    def test_dataloader(self) -> DataLoader[Any]:
        """The seconds of the episodes, in their order."""
        seconds = self.parts["test"]
        assert isinstance(seconds, Seconds)
        sharing = (self.trainer and self.trainer.distributed_sampler_kwargs) or {}
        self.fleet.episodes.clear()  # none of an earlier test goes on
        batches = SecondBySecond(seconds, self.eval_batch_size, sharing.get("num_replicas", 1))
        return DataLoader(seconds, batch_sampler=batches)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """In the test, with what the drivers see, as ``grid`` and ``vehicles``."""
        if not isinstance(batch, dict) or "second" not in batch:
            return batch
        seen = self.fleet.observe(batch["seed"].tolist(), int(batch["second"][0]))
        sensors = {name: np.stack([getattr(one, name) for one in seen]) for name in ("grid", "vehicles")}
        return {**batch, **{n: torch.from_numpy(values).to(batch["seed"].device) for n, values in sensors.items()}}

    def predict_dataloader(self) -> DataLoader[Any]:
        """The seconds of the expert that are held out."""
        return self._loader("val", self.eval_batch_size)


def _ends(name: str, ends: Sequence[int]) -> tuple[int, int]:
    if len(ends) != 2:
        raise ValueError(f"data.{name}={list(ends)} is no range; pass its first seed, and the one after its last")
    return int(ends[0]), int(ends[1])
