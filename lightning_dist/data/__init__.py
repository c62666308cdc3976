"""Which data rank reads what, and where in it a training is."""

from lightning_dist.data.global_batch import Division, can_be_divided, divide, divided
from lightning_dist.data.position import TrainingData
from lightning_dist.data.samplers import DistributedBatches, seed_loader
from lightning_dist.data.sharding import (
    distributed_batches,
    distributed_sampler,
    items_of_batch,
    shard_loader,
    share_generator,
    validate_same_batches,
)
from lightning_dist.data.shards import DamagedShard, ShardCache, ShardDataset, ShardSampler, index_shards
from lightning_dist.data.streams import DistributedStream, is_stream, shard_stream
from lightning_dist.data.tokens import (
    TokenDataset,
    TokenSampler,
    TokenStore,
    document_mask,
    document_mask_mod,
    tokenize,
)

__all__ = [
    "DamagedShard",
    "DistributedBatches",
    "DistributedStream",
    "Division",
    "ShardCache",
    "ShardDataset",
    "ShardSampler",
    "TokenDataset",
    "TokenSampler",
    "TokenStore",
    "TrainingData",
    "can_be_divided",
    "distributed_batches",
    "distributed_sampler",
    "divide",
    "divided",
    "document_mask",
    "document_mask_mod",
    "index_shards",
    "is_stream",
    "items_of_batch",
    "seed_loader",
    "shard_loader",
    "shard_stream",
    "share_generator",
    "tokenize",
    "validate_same_batches",
]
