"""Shards of samples, tar or Parquet files at any path or URL: listed, shuffled, cached and read."""

from lightning_dist.data.shards.cache import ShardCache
from lightning_dist.data.shards.check import check_index, drop_shards, index_shards
from lightning_dist.data.shards.dataset import ShardDataset
from lightning_dist.data.shards.index import DamagedShard, ShardIndex, read_index
from lightning_dist.data.shards.sampler import ShardSampler

__all__ = [
    "DamagedShard",
    "ShardCache",
    "ShardDataset",
    "ShardIndex",
    "ShardSampler",
    "check_index",
    "drop_shards",
    "index_shards",
    "read_index",
]
