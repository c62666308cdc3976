"""A user's script that trains, started as users start it, and what it leaves behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

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
ROOT = str(Path(__file__).parents[2])


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
