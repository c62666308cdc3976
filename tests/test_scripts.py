"""A user's script, started as users start it: Lightning's own launch, torchrun, spawn; and when a rank fails."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
import lightning as L
import lightning_dist
import torch
from torch.utils.data import DataLoader
sys.path.insert(0, {root!r})
from tests.support.models import Classifier, samples

class Fails(Classifier):
    def on_train_start(self):
        print(f"pid {{os.getpid()}}\\n", end="", flush=True)
        self.fail("hook")
    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            self.fail("step")
        return super().training_step(batch, batch_idx)
    def fail(self, where):
        if {where!r} == where and self.trainer.global_rank == {rank}:
            raise RuntimeError("the rank's own reason")
        if {where!r} == "sleep" and where == "step":
            import time
            print("asleep", flush=True)
            time.sleep(60)

class Samples(torch.utils.data.Dataset):
    inner = samples()
    def __len__(self): return 64
    def __getitem__(self, index):
        if {where!r} == "loader" and index == 16 + {rank}:
            raise RuntimeError("the rank's own reason")
        return self.inner[index]

if __name__ == "__main__":
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy={strategy}, max_epochs=1, logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary={summary})
    trainer.fit(Fails(), DataLoader(Samples(), batch_size=4))
    print(f"done {{trainer.global_rank}}\\n", end="", flush=True)
"""
ROOT = str(Path(__file__).parent.parent)


def _take_interrupts() -> None:
    """Also where the tests run in the background of a shell, which has its jobs ignore them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(
    folder: Path,
    *,
    strategy: str = "'hybrid'",
    where: str = "",
    rank: int = 0,
    torchrun: bool = False,
    summary: bool = False,
    text: str | None = None,
) -> subprocess.Popen[str]:
    script = folder / "script.py"
    own = SCRIPT.format(root=ROOT, strategy=strategy, where=where, rank=rank, summary=summary)
    script.write_text(own if text is None else text)
    command = [sys.executable, str(script)]
    if torchrun:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "PYTHONPATH": ROOT}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        preexec_fn=_take_interrupts,
        cwd=folder,
    )


def finish(process: subprocess.Popen[str], timeout: float = 90) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, output


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


def assert_no_process_left(output: str) -> None:
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", output)]
    assert len(pids) == 2, output
    deadline = time.monotonic() + 15
    while not all(map(gone, pids)) and time.monotonic() < deadline:
        os.sched_yield()
    assert all(map(gone, pids))


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
    ("where", "rank"), [("step", 1), pytest.param("hook", 1, marks=pytest.mark.slow), ("loader", 1)]
)
def test_a_failed_rank_ends_all_with_its_own_traceback(where: str, rank: int, tmp_path: Path) -> None:
    status, output = finish(start(tmp_path, where=where, rank=rank), timeout=60)
    assert status != 0
    assert "RuntimeError: the rank's own reason" in output
    assert "done" not in output
    assert_no_process_left(output)


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


def test_the_twin_package_is_refused_with_what_to_import(tmp_path: Path) -> None:
    program = "import pytorch_lightning as pl, lightning_dist; pl.Trainer(accelerator='cpu', strategy='hybrid')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode != 0
    assert "import lightning.pytorch as pl" in done.stderr
