"""Which data rank reads what, and where in it a training is."""

from lightning_dist.data.dealing import (
    DealtBatches,
    deal,
    dealt_batches,
    refuse_different_batches,
    seed_loader,
    share_generator,
)
from lightning_dist.data.position import TrainingData

__all__ = [
    "DealtBatches",
    "TrainingData",
    "deal",
    "dealt_batches",
    "refuse_different_batches",
    "seed_loader",
    "share_generator",
]
