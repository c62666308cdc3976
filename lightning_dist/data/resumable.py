"""Loaders whose samples their owner shards, or that are read as a stream: how they go on within an epoch.

[Note: streams are read again]
A stream without a state of its own goes on by reading once more what was read before. It gives the same only if it
begins as it began: so what the generators were then is kept, and the plain attributes of the data set that reading
changes (a counter of epochs, a generator of its own). Whole numbers and texts of the batches that are left out, which
are indices, labels or tokens mostly, are compared with those of the earlier run.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import random
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dist.compat.litdata import streaming_datasets
from lightning_dist.compat.torch import StandsForLoader
from lightning_dist.data.samplers import loader_seed
from lightning_dist.data.streams import DistributedStream, tensor_bytes
from lightning_dist.pytree import tree_leaves
from lightning_dist.random_states import CPU, RandomStates, kept_random_states


class Resumable(StandsForLoader):
    """A loader whose samples its owner shards: iterable data, a ``DistributedSampler``, or no ``DataLoader`` at all.

    It goes on by its own state where it, or an iterable data set without workers, has ``state_dict`` and
    ``load_state_dict``; else by leaving out batches, see [Note: streams are read again].

    Args:
        loader: the user's.
        kept: states of so many last batches: Lightning fetches one ahead, and gradients of some may add up.
    """

    def __init__(self, loader: Any, kept: Callable[[], int]) -> None:
        super().__init__(loader)
        self._skip, self._kept = 0, kept
        self._is_litdatas = next(streaming_datasets(getattr(loader, "dataset", None)), None) is not None
        self._goes_on = False
        """Whether the next iteration does, by the owner's state."""
        self._states: dict[int, Any] = {}
        """The owner's, after a number of batches."""
        self._before_next: dict[int, RandomStates] = {}
        """The generators', when the batch after a number of them was asked for."""
        self._random: dict[str, Any] | None = None
        dataset = getattr(loader, "dataset", None)
        owners = [loader] if getattr(loader, "num_workers", 0) else [loader, dataset]
        self._owner: Any = next(filter(_has_state, owners), None)
        self.keeps_its_place = self._owner is not None
        """Whether it has a state, by which it goes on."""
        # a DataLoader makes an iterator for each epoch, so what lasts is in the data set
        inner = loader.loader if isinstance(loader, DistributedStream) else loader
        lasting = dataset if isinstance(inner, DataLoader) else loader
        self._lasting: Any = lasting if _has_state(lasting) else None
        self._lasted: Any = None
        """The state of that when the iteration began."""
        self._read = dataset if isinstance(inner, DataLoader) else inner
        """What reading may change."""
        self._at_first = _plain_attributes(self._read)
        self._start: dict[str, Any] | None = None
        """How the iteration began, or is to begin."""
        self._seen: dict[int, int] = {}
        """Checksums of the batches up to a number of them."""
        self._to_see: int | None = None

    def begin(self, epoch: int, data_rank: int) -> None:
        """The next iteration is that of an epoch: its order, and the seed of its workers."""
        self._skip = 0
        for sampler in (getattr(self.loader, "sampler", None), getattr(self.loader, "batch_sampler", None)):
            if epoch and callable(set_epoch := getattr(sampler, "set_epoch", None)):
                set_epoch(epoch)
        if epoch and self._is_litdatas:
            self.loader.current_epoch = epoch  # LitData's loader counts those it has begun
        generator = getattr(self.loader, "generator", None)
        if isinstance(generator, torch.Generator) and generator.initial_seed() == loader_seed(data_rank):
            generator.manual_seed(generator.initial_seed())
            for _ in range(epoch):  # each iteration draws one
                torch.empty((), dtype=torch.int64).random_(generator=generator)

    def skip(self, batches: int, state: Any, start: Any = None) -> None:
        """The next iteration goes on after so many batches, by the state if there is one.

        Args:
            batches: of this rank.
            state: that it had after them; None where it had none, or other data ranks had it.
            start: how the earlier run's iteration began, if that is known.

        Raises:
            ValueError: the loader has states, and this rank has none.
        """
        if self._owner is None:
            self._skip, self._start = batches, start
            self._to_see = None if state is None else state.get("seen")
        elif state is None:
            raise ValueError(
                f"the {type(self._owner).__name__} has a state for each data rank, and the checkpoint was written "
                "within an epoch under another number of them; resume with as many, or from the end of an epoch"
            )
        else:
            self._owner.load_state_dict(state["owner"])
            self._goes_on = True
            self._states = {0: copy.deepcopy(state["owner"])}
        self._random = None if state is None else state["random"]

    def go_on_after_epoch(self, state: Any, start: Any = None) -> None:
        """The next iteration begins as after an epoch of an earlier run, by :meth:`state_after_epoch`."""
        lasting = None if state is None else state.get("lasting")
        if self._lasting is not None and lasting is not None:
            self._lasting.load_state_dict(lasting)
        if start is not None:
            self._begin_as(start)

    def state_after_epoch(self) -> Any:
        """What lasts from one epoch to the next."""
        lasting = None if self._lasting is None else copy.deepcopy(self._lasting.state_dict())
        return {"lasting": lasting, "start": self._now()}

    def _now(self) -> dict[str, Any] | None:
        """How an iteration would begin now; None where a state tells it."""
        if self._owner is not None or self._lasting is not None:
            return None
        is_stream = isinstance(self.loader, DistributedStream)
        generators = self.loader.random if is_stream else RandomStates.now(CPU)
        now = _plain_attributes(self._read)
        changed = {name: value for name, value in now.items() if not _is_same(value, self._at_first.get(name, _NONE))}
        return {"random": generators.to_state(), "attributes": changed}

    def _begin_as(self, start: dict[str, Any]) -> None:
        """The attributes, and for a stream that is sharded here its generators, are as they were."""
        _set_attributes(self._read, start["attributes"])
        if isinstance(self.loader, DistributedStream):
            self.loader.random = RandomStates.from_state(start["random"])

    def state_after(self, batches: int, ahead: bool) -> Any:
        """Where the loader stood after so many batches of this iteration, and the generators if it had read on."""
        random = self._before_next.get(batches) if ahead else None
        state = self._random if random is None else random.to_state()
        place = {"owner": self._states.get(batches), "random": state, "start": self._start}
        place["seen"] = self._seen.get(batches)
        return place if batches else (self._lasted or self.state_after_epoch()) | place

    def __iter__(self) -> Iterator[Any]:
        skip, self._skip, self._lasted = self._skip, 0, self.state_after_epoch()
        if self._is_litdatas and not self._goes_on:
            self.loader.restore = False  # it is reset by who asks for more than there is, which Lightning does not
        self._goes_on = False
        batches = self._begun(skip)
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
            else:
                self._seen[number + 1] = _checksum(batch, self._seen[number])
            for states in (self._states, self._before_next, self._seen):
                for old in [before for before in states if before < number - self._kept()]:
                    del states[old]
            yield batch

    def _begun(self, skip: int) -> Iterator[Any]:
        """The iterator, after so many batches."""
        start, wanted, seen = self._start if skip else None, self._to_see, 0
        self._to_see = None
        if start is None:
            self._start = self._now()
            batches = iter(self.loader)  # which may draw, as in one process
        with kept_random_states(CPU):
            if start is not None:
                self._begin_as(start)
                if not isinstance(self.loader, DistributedStream):
                    RandomStates.from_state(start["random"]).restore(CPU)
                batches = iter(self.loader)
            for _ in range(skip):
                seen = _checksum(next(batches, None), seen)
        if wanted is not None and seen != wanted:
            warnings.warn(  # of this rank's own data
                f"the batches before the checkpoint can't be read again: other data, or {type(self._read).__name__} "
                "goes by a state that nobody sees. The rest of this epoch may repeat samples and leave others out; "
                "give it state_dict and load_state_dict, or let it draw from torch's, numpy's or Python's generators",
                stacklevel=2,
            )
        self._seen = {0: seen}
        return batches

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name in ("loader", "state_dict", "load_state_dict"):
            raise AttributeError(name)
        return getattr(self.loader, name)


def _has_state(owner: Any) -> bool:
    """Whether it tells its state by itself; a data set of LitData wants to be told by its loader where it is."""
    if not hasattr(owner, "state_dict") or not hasattr(owner, "load_state_dict"):
        return False
    try:
        parameters = inspect.signature(owner.state_dict).parameters.values()
    except (TypeError, ValueError):  # of a method that is not Python's
        return True
    variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return all(p.default is not inspect.Parameter.empty or p.kind in variable for p in parameters)


def _drawn_from(random: dict[str, Any], batches: Iterator[Any]) -> Any:
    """The next batch, as made from these states of the generators, which are then as they were before."""
    with kept_random_states(CPU):
        RandomStates.from_state(random).restore(CPU)
        return next(batches)


_NONE = object()
_IN_NUMBERS = np.random.PCG64, np.random.PCG64DXSM
"""Of numpy's generators those whose state has no arrays."""


def _plain_attributes(owner: Any) -> dict[str, Any]:
    """An object's own numbers and texts by name, and states of its generators, as a checkpoint may hold them."""
    found = dict[str, Any]()
    for name, value in getattr(owner, "__dict__", {}).items():
        if isinstance(value, torch.Generator):
            found[name] = value.get_state()
        elif isinstance(value, np.random.Generator) and isinstance(value.bit_generator, _IN_NUMBERS):
            found[name] = copy.deepcopy(value.bit_generator.state)
        elif isinstance(value, random.Random):
            found[name] = value.getstate()
        elif type(value) in (bool, int, float, str, type(None)):
            found[name] = value
    return found


def _set_attributes(owner: Any, values: dict[str, Any]) -> None:
    """What :func:`_plain_attributes` told."""
    for name, value in values.items():
        current = vars(owner).get(name)
        if isinstance(current, torch.Generator):
            current.set_state(value)
        elif isinstance(current, np.random.Generator):
            current.bit_generator.state = value
        elif isinstance(current, random.Random):
            version, internal, gauss = value
            current.setstate((version, tuple(internal), gauss))
        else:
            setattr(owner, name, value)


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return type(one) is type(other) and repr(one) == repr(other)


def _checksum(batch: Any, before: int) -> int:
    """Of whole numbers and texts of a batch, some of them where they are many, and of the batches before. Nobody waits
    for what lies on a device, which is left out.
    """
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dtype in (torch.int64, torch.int32) and leaf.numel() and leaf.is_cpu:
            some = leaf.detach().reshape(-1)
            before = zlib.crc32(tensor_bytes(some[:: 1 + some.numel() // 64]), before)
        elif isinstance(leaf, (str, int)):
            before = zlib.crc32(repr(leaf).encode(), before)
    return before
