"""Parts of divided tensors, and the wholes that they make."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_dist import Layout, dtensors
from lightning_dist.compat.distributed import StridedShard
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled


def _values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    if dtype.is_floating_point:
        values.view(-1)[:2] = torch.tensor([-0.0, float("nan")])
    return values


def _wholes(bucket_bytes: int) -> None:
    mesh = Layout.parse("dp_shard=2,tp=2").build_mesh("cpu").root["dp_shard", "tp"]
    packed = StridedShard(0, split_factor=3)
    placements = [(Shard(0), packed), (Shard(0), Shard(1)), (Replicate(), Shard(0)), (Shard(0), Replicate())]
    for dtype in (torch.float32, torch.bfloat16, torch.bool):
        whole = _values((18, 5), dtype)
        for placement in placements:
            rows, columns = dtensors.held_indices_of(whole.shape, mesh, placement)
            local = whole[rows][:, columns]
            divided = DTensor.from_local(local, mesh, placement, run_check=False, shape=whole.shape, stride=(5, 1))
            for keep in (True, False):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(dtensors, "BUCKET_BYTES", bucket_bytes)
                    found = dtensors.full_on_host(divided, keep)
                expected = whole if keep else torch.empty(0)
                assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), (dtype, placement)


@pytest.mark.parametrize("bucket_bytes", [1, 64, 1 << 20], ids=["rows", "some rows", "at once"])
def test_whole_tensors_arrive_bit_for_bit_at_once_or_by_rows(bucket_bytes: int) -> None:
    run_on_ranks(4, _wholes, bucket_bytes)
