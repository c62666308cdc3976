"""Which data rank reads what, and where in it a training is."""

from lightning_dist.data.dealing import (
    deal,
    dealt_batches,
    refuse_different_batches,
    seed_loader,
    share_generator,
)
from lightning_dist.data.position import TrainingData
from lightning_dist.data.samplers import DealtBatches
from lightning_dist.data.streams import DealtStream, deal_stream, is_stream

__all__ = [
    "DealtBatches",
    "DealtStream",
    "TrainingData",
    "deal",
    "deal_stream",
    "dealt_batches",
    "is_stream",
    "refuse_different_batches",
    "seed_loader",
    "share_generator",
]
