"""Memory of a process that reads a store of any size."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from lightning_dist.data import TokenDataset, TokenSampler
from lightning_dist.data.tokens.format import StoreIndex, write_index
from lightning_dist.data.tokens.writer import ShardWriter
from tests.support.memory import resident_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def write_large(folder: Path, num_bytes: int, shard_bytes: int) -> None:
    document = 500
    tokens = (np.arange(shard_bytes // 2, dtype=np.uint32) * 2654435761 >> 16).astype(np.uint16)
    lengths = np.full(len(tokens) // document, document)
    lengths[-1] += len(tokens) % document
    shards = []
    for number in range(num_bytes // shard_bytes):
        writer = ShardWriter(folder, number, np.dtype("<u2"))
        writer.add(tokens, lengths)
        shards.append(writer.finish())
    write_index(folder, StoreIndex("uint16", 1 << 16, {"tokenizer": ""}, tuple(shards)))


@pytest.mark.parametrize(
    ("megabytes", "first", "most"),
    [pytest.param(64, 8, 16, id="64MB"), pytest.param(2048, 100, 50, id="2GB", marks=pytest.mark.slow)],
)
def test_resident_memory_does_not_grow_with_what_is_read(tmp_path: Path, megabytes: int, first: int, most: int) -> None:
    """All of a store is read, shuffled, with its documents; after the first part memory grows by no more than a bit."""
    write_large(tmp_path, megabytes << 20, shard_bytes=16 << 20)
    blocks = TokenDataset(tmp_path, 4096, documents=True)
    loader = DataLoader(blocks, 8, sampler=TokenSampler(blocks, seed=0, window=1 << 12))
    batch_bytes, start, peak, read = 8 * 4096 * 2, 0, 0, 0
    for number, batch in enumerate(loader):
        read += batch["inputs"].numel() * 2
        if read <= first << 20:
            start = resident_bytes()
        elif number % 16 == 0:
            peak = max(peak, resident_bytes())
    print(f"{megabytes} MB: {(peak - start) / 2**20:.1f} MiB more")
    assert read > (megabytes << 20) - 2 * batch_bytes
    assert 0 < peak < start + (most << 20)
