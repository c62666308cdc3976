"""Which data rank reads what, and where in it a training is."""

from lightning_dist.data.position import TrainingData
from lightning_dist.data.samplers import DistributedBatches, seed_loader
from lightning_dist.data.sharding import distributed_batches, shard_loader, share_generator, validate_same_batches
from lightning_dist.data.streams import DistributedStream, is_stream, shard_stream

__all__ = [
    "DistributedBatches",
    "DistributedStream",
    "TrainingData",
    "distributed_batches",
    "is_stream",
    "seed_loader",
    "shard_loader",
    "shard_stream",
    "share_generator",
    "validate_same_batches",
]
