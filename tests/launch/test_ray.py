"""launcher=ray: ranks as workers of Ray Train, on a cluster of this machine; Ray takes some ten seconds to start it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lightning_dist.elastic import WorkerFailed
from lightning_dist.launchers.ray import Ray
from tests.launch import workers
from tests.launch.commands import command, run


@pytest.mark.slow
def test_a_run_on_a_cluster_of_this_machine(tmp_path: Path):
    pytest.importorskip("ray")
    done = run(command("launcher=ray", "trainer.devices=2", directory=tmp_path), RAY_ADDRESS="")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Initializing distributed: GLOBAL_RANK: 0, MEMBER: 1/2" in done.stdout + done.stderr
    told = json.loads((tmp_path / "result.json").read_text())
    assert told["error"] is None
    assert told["metrics"]["test/loss"] < 1.0


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()


def asked(directory: Path, num_ranks: int = 2, **options) -> Ray:
    return Ray(num_ranks, {"CPU": 1}, storage=directory / "ray", **options)


@pytest.mark.slow
def test_ranks_start_again_after_a_failure(cluster, tmp_path: Path):
    """A rank is killed while the other waits for it."""
    assert asked(tmp_path, max_restarts=1).launch(workers.die_at_first, str(tmp_path)) == 2.0
    assert len(list(tmp_path.glob("rank-*"))) == 4


@pytest.mark.slow
def test_the_failure_of_the_rank_is_told(cluster, tmp_path: Path):
    with pytest.raises(WorkerFailed, match="rank 1 failed: ArithmeticError: the second rank fails on purpose"):
        asked(tmp_path).launch(workers.fail_as_second_rank, str(tmp_path))


@pytest.mark.slow
def test_more_than_the_cluster_has_is_refused(cluster, tmp_path: Path):
    with pytest.raises(ValueError, match="3 ranks need 3 CPU, and Ray's cluster has 2"):
        asked(tmp_path, num_ranks=3).launch(workers.describe, str(tmp_path))


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'lightning_dist\[ray\]'"):
        asked(tmp_path).launch(workers.describe, str(tmp_path))
