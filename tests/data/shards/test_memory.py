"""Memory of a process that reads shards of any size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from lightning_dist.data import ShardCache, ShardDataset, ShardSampler, index_shards
from tests.data.shards.files import numbered_tars
from tests.support.memory import resident_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.mark.parametrize(
    ("megabytes", "first", "most"),
    [pytest.param(64, 8, 16, id="64MB"), pytest.param(2048, 100, 50, id="2GB", marks=pytest.mark.slow)],
)
def test_resident_memory_does_not_grow_with_what_is_read(tmp_path: Path, megabytes: int, first: int, most: int) -> None:
    """All of it is read, shuffled; after the first part memory grows by no more than a bit."""
    folder = numbered_tars(tmp_path / "data", [128] * (megabytes // 8), padding=1 << 16)
    index_shards([folder])
    data = ShardDataset(folder, cache=ShardCache(tmp_path / "cache"))
    loader = DataLoader(data, 8, sampler=ShardSampler(data, seed=0, window=512))
    start, peak, read = 0, 0, 0
    for number, batch in enumerate(loader):
        read += sum(map(len, batch["bin"]))
        if read <= first << 20:
            start = resident_bytes()
        elif number % 16 == 0:
            peak = max(peak, resident_bytes())
    print(f"{megabytes} MB: {(peak - start) / 2**20:.1f} MiB more")
    assert read == megabytes << 20
    assert 0 < peak < start + (most << 20)
