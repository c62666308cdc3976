"""Processes that are preempted leave with the status that asks for another start, however they were started."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.preemption.training import REQUEUE
from tests.support.scripts import ROOT, finish, start

SCRIPT = """
import sys, time
import lightning as L
sys.path.insert(0, {root!r})
from torch.utils.data import DataLoader
from tests.support.models import Classifier, samples
from lightning_dist import HybridStrategy
from lightning_dist.elastic import launch

class Slow(Classifier):
    def on_train_batch_start(self, *args):
        if self.trainer.is_global_zero:
            print(f"step {{self.trainer.global_step}}\\n", end="", flush=True)
        time.sleep(0.02)

def main():
    strategy = HybridStrategy("dp_shard=2", max_time={max_time!r})
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps={max_steps}, logger=False,
                        max_epochs=-1, enable_checkpointing=False, enable_progress_bar=False,
                        enable_model_summary=False)
    trainer.fit(Slow(), DataLoader(samples(), batch_size=4))

if __name__ == "__main__":
    {start}
    print("after the fit", flush=True)
"""
STARTS = {"script": "main()", "torchrun": "main()", "launch": "launch(main, num_processes=2)"}


def script(how: str, max_time: str | None = None) -> str:
    return SCRIPT.format(root=ROOT, start=STARTS[how], max_time=max_time, max_steps=60 if max_time is None else -1)


def preempted(folder: Path, how: str, max_time: str | None = None) -> tuple[int, str]:
    """The status and output of a start that is told to leave once it trains."""
    process = start(folder, text=script(how, max_time), torchrun=how == "torchrun")
    output = ""
    assert process.stdout is not None
    while "step 5" not in output:
        line = process.stdout.readline()
        assert line, output
        output += line
    if max_time is None:
        process.send_signal(signal.SIGTERM)
    status, rest = finish(process)
    return status, output + rest


@pytest.mark.slow  # the status of ranks is shown in test_places.py
@pytest.mark.parametrize(
    ("how", "status"),
    [
        ("script", REQUEUE),
        ("launch", REQUEUE),
        ("torchrun", 1),  # its own
    ],
)
def test_a_signal_to_the_first_process(how: str, status: int, tmp_path: Path) -> None:
    left, output = preempted(tmp_path, how)
    assert left == status, output
    assert "after the fit" not in output
    (saved,) = re.findall(r"Preempted after step (\d+)", output)
    assert {file.name for file in tmp_path.iterdir()} == {"hpc_ckpt_1.ckpt", "hpc_ckpt_1.json", "script.py"}
    if how == "script":
        return  # that it goes on is shown below and in test_places.py
    status, output = finish(start(tmp_path, text=script(how), torchrun=how == "torchrun"))
    assert status == 0, output
    assert re.findall(r"step (\d+)", output)[0] == saved
    assert {file.name for file in tmp_path.iterdir()} == {"script.py"}


@pytest.mark.slow
def test_a_deadline(tmp_path: Path) -> None:
    left, output = preempted(tmp_path, "script", "00:00:00:25")  # from the start of the process
    assert left == REQUEUE, output
    assert "Preempted" in output


@pytest.mark.slow
def test_a_recipe(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "recipes.train",
        f"hydra.run.dir={tmp_path}",
        "data=stdlib",
        "recipe=language_model",
    ]
    command += ["model=decoder_tiny", "trainer.devices=2", "trainer.max_epochs=-1", "test=false", "callbacks=none"]
    command += ["scheduler=constant"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ}
    )
    deadline = time.monotonic() + 120
    while not any(tmp_path.rglob("events.out*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(5)
    process.send_signal(signal.SIGTERM)
    status, output = finish(process)
    assert status == REQUEUE, output
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists()
