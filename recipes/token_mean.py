"""The mean over all tokens of a batch, where samples have different numbers of them.

[Note: mean over tokens]
Data ranks are averaged, and so are microbatches of a pipeline. The mean of each rank's mean over its own tokens is not
the mean over all tokens where ranks have different numbers of them. So each sample carries an even share of the tokens
of the batch, over all ranks. A loss that is divided by the sum of these shares is a mean over samples, which averages
to the mean over tokens whichever way the samples are dealt. The batches of an accumulated step count alike, as
Lightning has it, however many tokens each of them has.
"""

from __future__ import annotations

from typing import cast

import lightning.pytorch as L
from torch import Tensor

NUM_TARGETS, SHARE = "num_targets", "share_of_targets"
"""Entries of a batch: the targets that count in each sample, and an even share of those of all ranks; ``(batch,)``."""


def add_shares(module: L.LightningModule, batch: dict[str, Tensor]) -> None:
    """Puts :data:`SHARE` into a batch that has :data:`NUM_TARGETS`; see [Note: mean over tokens].

    For ``on_train_batch_start``, where a batch is still whole.

    Communication: one all-reduce of a float32 over the ranks with different samples.
    """
    if NUM_TARGETS in batch:
        counts = batch[NUM_TARGETS]
        mean = cast(Tensor, module.trainer.strategy.reduce(counts.sum().float(), reduce_op="mean"))
        batch[SHARE] = (mean / len(counts)).expand(len(counts)).clone()


def mean_over_tokens(nats: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The mean over the tokens of a batch of all data ranks.

    Args:
        nats: loss of each target, ``(batch, length)``, 0 where a target is ignored.
        batch: of :func:`add_shares`; without shares, the mean is that of the batch alone.
    """
    counts = batch[SHARE if SHARE in batch else NUM_TARGETS]
    return nats.float().sum() / counts.sum()
