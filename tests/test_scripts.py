"""A user's script, started as users start it: Lightning's own launch, torchrun, spawn; and when a rank fails."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.scripts import ROOT, assert_no_process_left, finish, start


@pytest.mark.slow  # the ranks of other tests find the environment of torchrun
@pytest.mark.parametrize(
    ("strategy", "torchrun"),
    [
        pytest.param("'hybrid'", False, id="lightnings-launch"),
        pytest.param("'hybrid'", True, id="torchrun"),
        pytest.param("lightning_dist.HybridStrategy('dp_shard=2', start_method='spawn')", False, id="spawn"),
    ],
)
def test_a_script_trains(strategy: str, torchrun: bool, tmp_path: Path) -> None:
    status, output = finish(start(tmp_path, strategy=strategy, torchrun=torchrun, summary=True))
    assert status == 0, output
    assert "done 0" in output
    assert "│ dp_" in output
    if strategy == "'hybrid'":
        assert "│ auto" in output


@pytest.mark.parametrize(
    ("where", "rank"), [("step", 1), *(pytest.param(where, 1, marks=pytest.mark.slow) for where in ("hook", "loader"))]
)
def test_a_failed_rank_ends_all_with_its_own_traceback(where: str, rank: int, tmp_path: Path) -> None:
    status, output = finish(start(tmp_path, where=where, rank=rank), timeout=60)
    assert status != 0
    assert "RuntimeError: the rank's own reason" in output
    assert "done" not in output
    assert_no_process_left(output)


@pytest.mark.slow
def test_an_interrupt_ends_all_ranks(tmp_path: Path) -> None:
    process = start(tmp_path, where="sleep")
    assert process.stdout is not None
    seen = ""
    while "asleep" not in seen:
        line = process.stdout.readline()
        assert line, seen
        seen += line
    process.send_signal(signal.SIGINT)
    status, output = finish(process, timeout=60)
    assert status != 0
    assert_no_process_left(seen + output)


@pytest.mark.slow
def test_the_twin_package_is_refused_with_what_to_import(tmp_path: Path) -> None:
    program = "import pytorch_lightning as pl, lightning_dist; pl.Trainer(accelerator='cpu', strategy='hybrid')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode != 0
    assert "import lightning.pytorch as pl" in done.stderr
