"""The pool of ranks that tests run on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.support.ranks import RankError, run_on_ranks


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


def _fault(folder: Path, times: int) -> str:
    seen = len(list(folder.iterdir()))
    if seen < times:
        (folder / str(seen)).touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    return "ran"


def test_a_job_that_a_fault_of_memory_ends_is_told_and_runs_once_more(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="died with status -11; the job runs once more"):
        assert run_on_ranks(1, _fault, tmp_path, 1) == ["ran"]
    with pytest.warns(UserWarning, match="once more"), pytest.raises(RankError, match="died with status -11"):
        run_on_ranks(1, _fault, tmp_path, 3)
