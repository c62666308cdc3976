"""Collectives and bytes are counted as they are."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from recipes.benchmark.collectives import Collectives
from recipes.benchmark.data_parallel_collectives import CountedRuns, collectives
from recipes.benchmark.memory import storage_bytes
from recipes.benchmark.tensor_parallel import Llama
from recipes.benchmark.tensor_parallel import _collectives as _collectives_of_llama
from recipes.benchmark.workloads import WORKLOADS
from tests.support.ranks import run_on_ranks


def _ddp_step() -> tuple[dict[str, int], dict[str, int]]:
    net = DistributedDataParallel(nn.Linear(8, 4, bias=False))
    with Collectives() as seen:
        net(torch.ones(2, 8)).sum().backward()
    return dict(seen.count), dict(seen.num_bytes)


@pytest.mark.slow
def test_gradient_all_reduce_of_ddp_is_counted() -> None:
    assert run_on_ranks(2, _ddp_step)[0] == ({"all-reduce": 1}, {"all-reduce": 8 * 4 * 4})


def _shard_step() -> tuple[dict[str, int], dict[str, int]]:
    net = nn.Linear(8, 4, bias=False)
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    with Collectives() as seen:
        net(torch.ones(2, 8)).sum().backward()
    return dict(seen.count), dict(seen.num_bytes)


def test_collectives_of_fully_shard_are_counted_with_the_bytes_of_the_whole() -> None:
    whole = 8 * 4 * 4
    count, num_bytes = run_on_ranks(2, _shard_step)[0]
    assert count == {"all-gather": 1, "reduce-scatter": 1}
    assert num_bytes == {"all-gather": whole, "reduce-scatter": whole}


def _norm_of_dtensor() -> dict[str, int]:
    shard = distribute_tensor(torch.ones(8), init_device_mesh("cpu", (2,)), [Shard(0)])
    with Collectives() as seen:
        norm = torch.linalg.vector_norm(shard)
        assert isinstance(norm, DTensor)
        norm.full_tensor()
    return dict(seen.count)


def test_collectives_inside_dtensor_are_counted() -> None:
    assert run_on_ranks(2, _norm_of_dtensor)[0] == {"all-reduce": 1}


def test_storage_is_counted_once_and_whole() -> None:
    buffer = torch.zeros(10)
    assert storage_bytes([buffer[:4], buffer[4:6], torch.zeros(3)]) == 4 * (10 + 3)


def _verdicts() -> dict[str, str]:
    workload = WORKLOADS["vit_tiny"]
    layouts = CountedRuns(workload, "dp_replicate=2", 2, 1), CountedRuns(workload, "dp_shard=2", 1, 2)
    lines = [line for runs in layouts for line in collectives("vit_tiny", runs)]
    return {f"{line.group}: {line.what}": line.verdict for line in lines}


@pytest.mark.slow
def test_clip_norm_costs_one_collective_and_accumulation_none() -> None:
    verdicts = run_on_ranks(2, _verdicts)[0]
    asked = {what: verdict for what, verdict in verdicts.items() if "clip norm" in what or "micro-steps" in what}
    assert len(asked) == 4
    assert set(asked.values()) == {"reached"}


def _of_the_tensor_axis() -> tuple[int, int]:
    with_must = _collectives_of_llama(Llama(width=128, depth=2, vocabulary=48, batch=2, length=8))
    return with_must[0].data["ours"], with_must[0].data["peer"]


def test_a_step_of_llama_takes_the_fewest_collectives() -> None:
    """Two each way and block, one for the embedding, two for the loss, one for the head; torch's plan: 7 a block."""
    for ours, peer in run_on_ranks(2, _of_the_tensor_axis):
        assert ours == 2 * 4 + 4
        assert peer == 2 * 7 + 3
