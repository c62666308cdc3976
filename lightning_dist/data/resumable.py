"""A training loader that its owner shards, and how it goes on within an epoch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_dist.compat.torch import StandsForLoader
from lightning_dist.data.seeds import loader_seed
from lightning_dist.data.streams import DistributedStream
from lightning_dist.random_states import CPU, RandomStates, kept_random_states


class Resumable(StandsForLoader):
    """A loader whose samples its owner shards: iterable data, a ``DistributedSampler``, or no ``DataLoader`` at all.

    It goes on by its own state where it, or an iterable data set without workers, has ``state_dict`` and
    ``load_state_dict``; else by leaving out batches, which reads them once more.

    Args:
        loader: the user's.
        kept: states of so many last batches: Lightning fetches one ahead, and gradients of some may add up.
    """

    def __init__(self, loader: Any, kept: Callable[[], int]) -> None:
        super().__init__(loader)
        self._skip, self._kept = 0, kept
        self._states: dict[int, Any] = {}
        """The owner's, after a number of batches."""
        self._before_next: dict[int, RandomStates] = {}
        """The generators', when the batch after a number of them was asked for."""
        self._random: dict[str, Any] | None = None
        dataset = getattr(loader, "dataset", None)
        owners = [loader] if getattr(loader, "num_workers", 0) else [loader, dataset]
        self._owner: Any = next(filter(_has_state, owners), None)
        # a DataLoader makes an iterator for each epoch, so what lasts is in the data set
        inner = loader.loader if isinstance(loader, DistributedStream) else loader
        lasting = dataset if isinstance(inner, DataLoader) else loader
        self._lasting: Any = lasting if _has_state(lasting) else None
        self._lasted: Any = None
        """The state of that when the iteration began."""

    def begin(self, epoch: int, data_rank: int) -> None:
        """The next iteration is that of an epoch: its order, and the seed of its workers."""
        self._skip = 0
        for sampler in (getattr(self.loader, "sampler", None), getattr(self.loader, "batch_sampler", None)):
            if epoch and callable(set_epoch := getattr(sampler, "set_epoch", None)):
                set_epoch(epoch)
        generator = getattr(self.loader, "generator", None)
        if isinstance(generator, torch.Generator) and generator.initial_seed() == loader_seed(data_rank):
            generator.manual_seed(generator.initial_seed())
            for _ in range(epoch):  # each iteration draws one
                torch.empty((), dtype=torch.int64).random_(generator=generator)

    @property
    def keeps_its_place(self) -> bool:
        """Whether it has a state, by which it goes on."""
        return self._owner is not None

    def skip(self, batches: int, state: Any) -> None:
        """The next iteration goes on after so many batches, by the state if there is one.

        Raises:
            ValueError: the loader has states, and this rank has none.
        """
        if self._owner is None:
            self._skip = batches
        elif state is None:
            raise ValueError(
                f"the {type(self._owner).__name__} has a state for each data rank, and the checkpoint was written "
                "within an epoch under another number of them; resume with as many, or from the end of an epoch"
            )
        else:
            self._owner.load_state_dict(state["owner"])
            self._states = {0: copy.deepcopy(state["owner"])}
        self._random = None if state is None else state["random"]

    def go_on_after_epoch(self, state: Any) -> None:
        """The next iteration begins as after an epoch of an earlier run, by :meth:`state_after_epoch`."""
        lasting = None if state is None else state.get("lasting")
        if self._lasting is not None and lasting is not None:
            self._lasting.load_state_dict(lasting)

    def state_after_epoch(self) -> Any:
        """What lasts from one epoch to the next."""
        return {"lasting": None if self._lasting is None else copy.deepcopy(self._lasting.state_dict())}

    def state_after(self, batches: int, ahead: bool) -> Any:
        """Where the loader stood after so many batches of this iteration, and the generators if it had read on."""
        random = self._before_next.get(batches) if ahead else None
        state = self._random if random is None else random.to_state()
        place = {"owner": self._states.get(batches), "random": state}
        return place if batches else place | (self._lasted or self.state_after_epoch())

    def __iter__(self) -> Iterator[Any]:
        skip, self._skip, self._lasted = self._skip, 0, self.state_after_epoch()
        batches = iter(self.loader)
        with kept_random_states(CPU):
            for _ in range(skip):
                next(batches, None)
        self._states = {number: state for number, state in self._states.items() if not number}
        self._before_next.clear()
        for number in itertools.count():
            random, self._random = self._random, None
            self._before_next[number] = RandomStates.now(CPU) if random is None else RandomStates.from_state(random)
            try:
                batch = next(batches) if random is None else _drawn_from(random, batches)
            except StopIteration:
                return
            if self._owner is not None:
                self._states[number + 1] = copy.deepcopy(self._owner.state_dict())
            for states in (self._states, self._before_next):
                for old in [before for before in states if before < number - self._kept()]:
                    del states[old]
            yield batch

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name in ("loader", "state_dict", "load_state_dict"):
            raise AttributeError(name)
        return getattr(self.loader, name)


def _has_state(owner: Any) -> bool:
    return hasattr(owner, "state_dict") and hasattr(owner, "load_state_dict")


def _drawn_from(random: dict[str, Any], batches: Iterator[Any]) -> Any:
    """The next batch, as made from these states of the generators, which are then as they were before."""
    with kept_random_states(CPU):
        RandomStates.from_state(random).restore(CPU)
        return next(batches)
