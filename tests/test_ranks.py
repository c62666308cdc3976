"""The pool of ranks that tests run on."""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.support.ranks import run_on_ranks


def _num_threads_before(width: int) -> int:
    """A job that shards a network of a shape of its own, which DTensor has not seen."""
    before = len(os.listdir("/proc/self/task"))
    network = nn.Linear(3, width)
    fully_shard(network, mesh=init_device_mesh("cpu", (2,)))
    network(torch.ones(2, 3)).sum().backward()
    return before


def test_a_job_leaves_no_threads_of_its_group_behind() -> None:
    counts = [run_on_ranks(2, _num_threads_before, 1000 + width) for width in range(5)]
    assert counts[1] == counts[4]
