"""How the batch of an optimizer step is divided over another number of data ranks than it was meant for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

from torch.utils.data import BatchSampler, DataLoader

from lightning_dist.data.samplers import DistributedOrder, DistributedSamples
from lightning_dist.data.sharding import distributed_sampler, with_batch_sampler


@dataclass(frozen=True)
class Division:
    """A step's batch over the data ranks that are there, each of which takes ``batch_size`` items at a time.

    Attributes:
        first_ranks, num_ranks: the data ranks that the user's batch size is for, and those that there are.
        first_size, batch_size: items of a rank's batch on those: samples, or batches where those are dealt whole.
    """

    first_ranks: int
    num_ranks: int
    first_size: int
    batch_size: int

    @property
    def ratio(self) -> Fraction:
        """Batches now for one on the first ranks; so many times as many are accumulated."""
        return Fraction(self.first_size * self.first_ranks, self.batch_size * self.num_ranks)

    @property
    def unit(self) -> int | None:
        """What the items of an epoch are filled up to a multiple of, so that they are those of the first ranks."""
        return self.first_ranks if self.first_ranks % self.num_ranks == 0 else None

    @property
    def unit_dropped(self) -> int | None:
        """What they are cut to a multiple of, where what is left over is dropped: all batches of the first ranks."""
        whole = self.first_ranks * self.first_size
        return whole if whole % self.num_ranks == 0 else None

    def weight(self, number: int, size: int, drops: bool, is_fixed: bool = False) -> float:
        """What the mean loss of a batch counts, beside that of a full one.

        1, but at the end of an epoch: there the first ranks' last batch, however small, counts as much as a full one,
        and is divided here among batches of other sizes.

        Args:
            number: of the batch in its epoch.
            size: of the epoch, in items.
            drops: what is left over is dropped.
            is_fixed: batches are those of the loader itself, of which the last may be smaller.
        """
        whole, ratio = self.first_ranks * self.first_size, self.ratio
        total = size // whole * whole if drops else math.ceil(size / self.first_ranks) * self.first_ranks
        full, rest = divmod(total, whole)
        if ratio.denominator == 1 and not is_fixed:
            sizes = self.sizes_of_rest(math.ceil(rest / self.num_ranks))
            index = number - full * int(ratio)
            return float(ratio) * sizes[index] / sum(sizes) if 0 <= index < len(sizes) else 1.0

        def batches_before(item: int) -> float:
            return min(item, full * whole) / whole + (max(0, min(item, total) - full * whole) / rest if rest else 0)

        step = self.batch_size * self.num_ranks
        return float(ratio) * (batches_before((number + 1) * step) - batches_before(number * step))

    def sizes_of_rest(self, items: int) -> list[int]:
        """Of the batches of a rank that are the first ranks' last one; as many as those of a full one, or as items."""
        count = min(int(self.ratio), items)
        return [items // count + (index < items % count) for index in range(count)] if count else []


class DividedBatches(BatchSampler):
    """The batches of a rank under a :class:`Division`: each of the first ranks' is the same number of them, or the same
    part of one, so that the last may be smaller.

    Args:
        order: this rank's share of the items, from which the first ranks' incomplete batch was cut if it is dropped.
        division: of the batches.
    """

    def __init__(self, order: DistributedSamples, division: Division) -> None:
        super().__init__(order, division.batch_size, drop_last=False)
        self._division = division
        self._together = division.batch_size * int(division.ratio) if division.ratio.denominator == 1 else 0

    def __iter__(self) -> Iterator[list[int]]:
        items = iter(self.sampler)
        while batch := list(itertools.islice(items, self._together or self.batch_size)):
            if not self._together:
                sizes = [len(batch)]
            elif len(batch) < self._together:
                sizes = self._division.sizes_of_rest(len(batch))
            else:
                sizes = [self.batch_size] * int(self._division.ratio)
            start = 0
            for size in sizes:
                yield batch[start : start + size]
                start += size

    def __len__(self) -> int:
        return self.batches_of(len(self.sampler))  # type: ignore[arg-type]

    def batches_of(self, items: int) -> int:
        """Of so many items of this rank, at the end of an epoch."""
        if not self._together:
            return math.ceil(items / self.batch_size)
        full, rest = divmod(items, self._together)
        return full * (self._together // self.batch_size) + len(self._division.sizes_of_rest(rest))


def divide(
    first_size: int, first_ranks: int, num_ranks: int, accumulate: Sequence[int], is_fixed: bool = False
) -> Division:
    """The division with the largest batches that are no larger than the user's, and the same batch for each step.

    Args:
        first_size: items of a rank's batch, as the user wrote it, for ``first_ranks`` data ranks.
        num_ranks: data ranks that are there.
        accumulate: over how many batches gradients add up on the first ranks, by epoch; empty where they can't
            (manual optimization): then batches may be larger.
        is_fixed: batches can't have another size.

    Raises:
        ValueError: there is none; names the numbers of data ranks for which there is.
    """
    times = math.gcd(*accumulate) if accumulate else 1
    step = first_size * first_ranks * times

    def size_on(ranks: int) -> int | None:
        sizes = [first_size] if is_fixed else range(first_size, 0, -1)
        if not accumulate:
            sizes = [step // ranks] if not is_fixed or step // ranks == first_size else []
        return next((size for size in sizes if size and step % (size * ranks) == 0), None)

    size = size_on(num_ranks)
    if size is None:
        others = ", ".join(str(ranks) for ranks in range(1, step + 1) if step % ranks == 0 and size_on(ranks))
        raise ValueError(
            f"a step's batch was {step} items when the run began: batches of {first_size} on {first_ranks} data ranks"
            f"{f', accumulated over {times}' if times > 1 else ''}. {num_ranks} data ranks can't take the same"
            f"{', with batches that the loader makes itself' if is_fixed else ''}; {others} can"
        )
    return Division(first_ranks, num_ranks, first_size, size)


def divided(loader: DataLoader, division: Division) -> DataLoader:
    """A loader of :func:`~lightning_dist.data.shard_loader`, in batches of this division; changed in place.

    Raises:
        ValueError: it drops its last batch, and the batches before can't be dealt evenly to these data ranks.
    """
    order = distributed_sampler(loader)
    assert isinstance(order, DistributedOrder)
    drops = bool(loader.drop_last)
    order.unit = division.unit_dropped if drops else division.unit
    if not can_be_divided(loader):
        return loader
    whole, ranks = division.first_ranks * division.first_size, division.num_ranks
    if drops and order.unit is None and (len(order.source) // whole * whole) % (division.batch_size * ranks):
        others = ", ".join(str(number) for number in range(1, whole + 1) if whole % number == 0)
        raise ValueError(
            f"with drop_last=True an epoch has {len(order.source) // whole} batches of {whole} items, as the run began "
            f"on {division.first_ranks} data ranks, and {ranks} can't share the last of them evenly; {others} can"
        )
    return with_batch_sampler(loader, DividedBatches(cast(DistributedSamples, order), division))


def can_be_divided(loader: Any) -> bool:
    """Whether the batches of a training loader can be made of another size."""
    return isinstance(distributed_sampler(loader), DistributedSamples) and type(loader.batch_sampler) is BatchSampler
