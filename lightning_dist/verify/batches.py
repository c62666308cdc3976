"""Batches as the steps of data ranks got them, joined to those of one process.

[Note: the batches of one process]
Under data axes each data rank has a batch of its own, made by whatever the user has: samplers, collate functions,
augmentation, streams. So the layout trains first, and what its steps were given is written down, after all hooks of
the transfer to the device. One process is then given those batches, joined along their samples in the order of the
data ranks, in the same epochs, with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from typing_extensions import override

from lightning_dist.parallel.pipeline.batch_split import EACH, Splitter, sample_places
from lightning_dist.pytree import PLAIN, deep_leaves, deep_map, rebuilt

_ADVICE = "give every data rank batches of one form and size (padding to a fixed length, drop_last=True, fewer steps)"


@dataclass
class Recorded:
    """What the steps of a training were given.

    Args:
        batches: on the CPU.
        epochs: the epoch of each.
        length: batches of an epoch, where it has an end.
        validation: batches of the validation after it, by loader.
        by_loader: a batch has those of several loaders, each with its own number of samples.
        alike: what data ranks were given that is the same, though it should not be; sentences.
    """

    batches: list[Any] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    length: float = float("inf")
    validation: list[list[Any]] = field(default_factory=list)
    by_loader: bool = False
    alike: list[str] = field(default_factory=list)

    def loader(self, of: Callable[[], Any] = lambda: None) -> Any:
        """What gives them again, epoch by epoch; ``of`` gives the user's own loader, whose attributes it has too."""
        return _Endless(self, of) if self.length == float("inf") else _Finite(self, of)

    @property
    def num_validation(self) -> list[int]:
        """Batches of the validation, by loader."""
        return [len(batches) for batches in self.validation]

    def validation_loaders(self, of: Callable[[], Any] = lambda: None) -> Any:
        """What gives the batches of the validation again; ``of`` gives the user's own loaders."""
        own = [partial(_number, of, index) for index in range(len(self.validation))]
        loaders = [_Listed(batches, of_one) for batches, of_one in zip(self.validation, own, strict=True)]
        return loaders[0] if len(loaders) == 1 else loaders

    def is_like(self, other: Recorded) -> bool:
        """Whether a step was given the same by both, epoch by epoch."""
        places = self.epochs == other.epochs and self.length == other.length
        places = places and self.num_validation == other.num_validation
        mine, theirs = (deep_leaves([one.batches, one.validation]) for one in (self, other))
        return places and len(mine) == len(theirs) and all(map(_is_same, mine, theirs))


class _Again:
    """A loader that has the attributes of another, which is made where one is asked for.

    Args:
        of: makes it.
    """

    def __init__(self, of: Callable[[], Any]) -> None:
        self._of = of

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if "_own" not in vars(self):
            self._own = self._of()
        return getattr(vars(self)["_own"], name)


class _Endless(_Again):
    def __init__(self, recorded: Recorded, of: Callable[[], Any]) -> None:
        super().__init__(of)
        self._recorded, self._epoch = recorded, -1

    def __iter__(self) -> Iterator[Any]:
        self._epoch += 1  # at the first batch: Lightning tries whether loaders can be iterated
        for epoch, batch in zip(self._recorded.epochs, self._recorded.batches, strict=True):
            if epoch == self._epoch:
                yield batch


class _Finite(_Endless):
    def __len__(self) -> int:
        return int(self._recorded.length)


class _Listed(_Again):
    """Batches, as a loader: Lightning takes each item of a list for one."""

    def __init__(self, batches: list[Any], of: Callable[[], Any]) -> None:
        super().__init__(of)
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def _number(of: Callable[[], Any], index: int) -> Any:
    loaders = of()
    return loaders[index] if isinstance(loaders, (list, tuple)) else loaders


class BatchRecorder(Callback):
    """Writes down what the steps of this rank are given, in training and in validation."""

    def __init__(self) -> None:
        self.recorded = Recorded()

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        self.recorded.length = trainer.num_training_batches
        self.recorded.by_loader = _is_of_several(trainer.train_dataloader, batch)
        self.recorded.epochs.append(trainer.current_epoch)
        self.recorded.batches.append(deep_map(batch, _kept))

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        validation = self.recorded.validation
        validation.extend([] for _ in range(len(validation), dataloader_idx + 1))
        validation[dataloader_idx].append(deep_map(batch, _kept))


def _is_of_several(loaders: Any, batch: Any) -> bool:
    """Whether a batch has an item for each of several loaders."""
    of = loaders.flattened if isinstance(loaders, CombinedLoader) else loaders
    return all(isinstance(each, (list, tuple, Mapping)) for each in (of, batch)) and len(batch) == len(of)


def _kept(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().to("cpu", copy=True)
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def give_again(recorded: Recorded, module: pl.LightningModule, data: Any) -> Any:
    """The data of a fit, and of the validation after it, whose steps are given what was recorded; hooks before and
    after the transfer have run then.

    Args:
        recorded: by a fit.
        module: of the next one; its hooks are taken off.
        data: a LightningDataModule, which stays the trainer's, or anything else.
    """
    is_module = isinstance(data, pl.LightningDataModule)
    owners = (module, data) if is_module else (module,)
    own = [owner.train_dataloader for owner in owners if is_overridden("train_dataloader", owner)]
    loader = recorded.loader(own[-1] if data is None or is_module else lambda: data)
    for owner in owners:
        vars(owner).update(on_before_batch_transfer=_as_it_is, on_after_batch_transfer=_as_it_is)
        vars(owner).update(transfer_batch_to_device=_moved)
        if recorded.validation:
            vars(owner)["val_dataloader"] = partial(recorded.validation_loaders, owner.val_dataloader)
    if not is_module:
        return loader
    vars(data)["train_dataloader"] = lambda: loader
    return data


def _moved(batch: Any, device: torch.device, dataloader_idx: int) -> Any:
    return deep_map(batch, lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)


def _as_it_is(batch: Any, dataloader_idx: int) -> Any:
    return batch


def joined(of_ranks: list[Recorded], batch_split: Any = None) -> Recorded:
    """The batches of one process.

    Args:
        of_ranks: by data rank.
        batch_split: where a batch has its samples, see :class:`~..batch_split.Splitter`; a function says nothing.

    Raises:
        ValueError: they can't be joined, in one sentence.
    """
    first = of_ranks[0]
    if len(of_ranks) == 1:
        return first
    if any(other.epochs != first.epochs for other in of_ranks):
        raise ValueError(f"the data ranks had other numbers of batches in an epoch: {_ADVICE}")
    join: Callable[[int, list[Any]], Any] = partial(_joined_batch, split=None if callable(batch_split) else batch_split)
    if first.by_loader and batch_split is None:
        join = _joined_by_loader
    steps = zip(*(one.batches for one in of_ranks), strict=True)
    batches = [join(step, list(parts)) for step, parts in enumerate(steps, 1)]
    return Recorded(batches, first.epochs, first.length)


def told_alike(of_ranks: list[Recorded], own: Recorded) -> list[str]:
    """Where data ranks are given the same batches.

    Args:
        of_ranks: by data rank.
        own: of one process with its own data, which may be the same in each step.
    """
    told, advice = list[str](), "divide the data set's samples over the data ranks"
    first, *rest = (one.batches for one in of_ranks)
    others = next((rank for rank, batches in enumerate(rest, 1) if _is_same_list(first, batches)), 0)
    if others and own.length >= len(of_ranks) and _are_several(own.batches):
        same = f"data ranks 0 and {others} are given the same batch in each step, and one process others"
        told.append(f"{same}: {advice}")
    for own_batches, first, *rest in zip(own.validation, *(one.validation for one in of_ranks), strict=False):
        if len(first) > 1 and _are_several(own_batches) and rest and all(_is_same_list(first, other) for other in rest):
            told.append(f"all data ranks are given the same {len(first)} batches of the validation: {advice}")
    return told


def _is_same_list(mine: list[Any], others: list[Any]) -> bool:
    return len(mine) == len(others) and all(map(_is_alike, mine, others))


def _are_several(batches: list[Any]) -> bool:
    """Whether not all are the same one."""
    return any(not _is_alike(batches[0], batch) for batch in batches[1:])


def _is_alike(one: Any, other: Any) -> bool:
    mine, theirs = deep_leaves(one), deep_leaves(other)
    return len(mine) == len(theirs) and all(map(_is_same, mine, theirs))


def interleaved(of_ranks: list[Recorded], num_batches: list[int]) -> list[list[Any]]:
    """The batches of the validation of one process, by loader: evaluation deals out whole ones.

    Args:
        of_ranks: by data rank.
        num_batches: that one process itself has, by loader. Where the ranks were given more, those at the end are left
            out that repeat an earlier one, as ranks do that have none left.
    """
    dealt = []
    for index in range(max(len(one.validation) for one in of_ranks)):
        rounds = zip_longest(
            *(one.validation[index] for one in of_ranks if index < len(one.validation)), fillvalue=_NONE
        )
        batches = [batch for dealt_at_once in rounds for batch in dealt_at_once if batch is not _NONE]
        own = num_batches[index] if index < len(num_batches) else len(batches)
        if len(batches) - own < len(of_ranks):
            while len(batches) > own and _is_repeated(batches[-1], batches[:-1]):
                batches.pop()
        dealt.append(batches)
    return dealt


_NONE = object()


def _is_repeated(batch: Any, earlier: list[Any]) -> bool:
    """Whether it is equal to one before; of what can't be compared, as if it were."""
    can_be_compared = all(isinstance(leaf, (Tensor, np.ndarray, *PLAIN)) for leaf in deep_leaves(batch))
    return not can_be_compared or any(_is_alike(batch, other) for other in earlier)


def _joined_by_loader(step: int, parts: list[Any]) -> Any:
    """Each loader's batches by themselves; one that has ended gives None."""
    keys = list(parts[0]) if isinstance(parts[0], Mapping) else range(len(parts[0]))
    items = {key: [part[key] for part in parts] for key in keys}
    new = {k: None if all(i is None for i in of) else _joined_batch(step, of) for k, of in items.items()}
    if isinstance(parts[0], Mapping):
        return new if type(parts[0]) is dict else rebuilt(parts[0], new)
    return type(parts[0])(new.values())


def _joined_batch(step: int, parts: list[Any], split: Any = None) -> Any:
    where = f"the batches of the data ranks in step {step} can't be joined"
    splitter = Splitter(split)
    try:
        sizes = [splitter.size(part) for part in parts]
        places = [sample_places(part) if split is None else split for part in parts]
    except ValueError:
        kind = type(parts[0]).__name__
        raise ValueError(f"{where}: this {kind} has no tensor whose first dim could be the samples") from None
    if len(set(sizes)) > 1:
        raise ValueError(f"{where}: they have {sizes} samples, whose mean is not the mean of all; {_ADVICE}")
    if any(other != places[0] for other in places):
        raise ValueError(f"{where}: they have their samples in different places; {_ADVICE}")
    return _join(parts, places[0], partial(_refuse, where))


def _refuse(where: str, why: str) -> Any:
    raise ValueError(f"{where}: {why}; {_ADVICE}")


def _join(parts: list[Any], places: Any, refuse: Callable[[str], Any]) -> Any:
    """The parts of a value as one, by where it has its samples, see :func:`~..batch_split.sample_places`."""
    first = parts[0]
    if places == EACH:
        return [item for part in parts for item in part]
    if isinstance(places, int):
        return _concatenated_leaves(parts, places, refuse)
    if isinstance(places, (list, tuple)):
        items = [_join([part[i] for part in parts], place, refuse) for i, place in enumerate(places)]
        return first._make(items) if hasattr(first, "_make") else type(first)(items)
    if isinstance(places, Mapping):
        new = {key: _join([part[key] for part in parts], places.get(key), refuse) for key in first}
        return new if type(first) is dict else rebuilt(first, new)
    leaves = [deep_leaves(part) for part in parts]
    if places is not None and len({len(found) for found in leaves}) == 1:  # the fields of an object
        new_leaves = iter([_joined_leaf(list(items), refuse) for items in zip(*leaves, strict=True)])
        return deep_map(first, lambda _: next(new_leaves))
    if not all(_is_same(leaf, mine) for found in leaves for leaf, mine in zip(found, leaves[0], strict=False)):
        refuse(f"a {type(first).__name__} that is no tensor of all samples differs between them")
    return first


def _concatenated_leaves(parts: list[Any], dim: int, refuse: Callable[[str], Any]) -> Any:
    """Arrays along a dim; of what holds arrays, as a user's ``batch_split`` may say, each of them."""
    if isinstance(parts[0], (Tensor, np.ndarray)):
        return _concatenated(parts, dim, refuse)
    leaves = zip(*(deep_leaves(part) for part in parts), strict=True)
    new = iter([_joined_leaf(list(items), refuse, dim) for items in leaves])
    return deep_map(parts[0], lambda _: next(new))


def _joined_leaf(leaves: list[Any], refuse: Callable[[str], Any], dim: int = 0) -> Any:
    if isinstance(leaves[0], (Tensor, np.ndarray)) and leaves[0].ndim > dim:
        return _concatenated(leaves, dim, refuse)
    if not all(_is_same(leaf, leaves[0]) for leaf in leaves):
        refuse(f"a {type(leaves[0]).__name__} that is no tensor of all samples differs between them")
    return leaves[0]


def _concatenated(parts: list[Any], dim: int, refuse: Callable[[str], Any]) -> Any:
    shapes = [tuple(part.shape) for part in parts]
    if len({(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}) > 1:
        refuse(f"a tensor is of shape {', '.join(map(str, shapes))}")
    return torch.cat(parts, dim) if isinstance(parts[0], Tensor) else np.concatenate(parts, dim)


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return bool(np.array_equal(one, other))
    try:
        return bool(one == other)
    except Exception:
        return False
