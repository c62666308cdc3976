"""Tokens on the disk: a store of any size, written in parallel, read in blocks without holding it."""

from lightning_dist.data.tokens.check import check_store, drop_shards
from lightning_dist.data.tokens.dataset import TokenDataset
from lightning_dist.data.tokens.format import DamagedStore, StoreIndex
from lightning_dist.data.tokens.masks import document_mask, document_mask_mod
from lightning_dist.data.tokens.sampler import TokenSampler
from lightning_dist.data.tokens.store import TokenStore
from lightning_dist.data.tokens.tokenization import tokenize

__all__ = [
    "DamagedStore",
    "StoreIndex",
    "TokenDataset",
    "TokenSampler",
    "TokenStore",
    "check_store",
    "document_mask",
    "document_mask_mod",
    "drop_shards",
    "tokenize",
]
