"""Whole processes, from their start to the end of their first training step."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID")


def commands(ranks: int) -> dict[str, Callable[[Path], list[str]]]:
    """How a user starts a training, by name; each with a callback that notes the first step in a file."""
    script = str(Path(__file__).with_name("user_script.py"))

    def of_script(strategy: str) -> Callable[[Path], list[str]]:
        return lambda file: [sys.executable, script, strategy, str(ranks), str(file)]

    def of_recipe(file: Path) -> list[str]:
        options = {
            "trainer.accelerator": "cpu",
            "trainer.devices": ranks,
            "trainer.max_steps": 2,
            "trainer.limit_val_batches": 0,
            "trainer.enable_progress_bar": "false",
            "test": "false",
            "hydra.run.dir": file.parent / "run",
            "callbacks": "none",
            "logger": "none",
            "+callbacks.first_step._target_": "recipes.benchmark.first_step.FirstStep",
            "+callbacks.first_step.file": file,
        }
        return [sys.executable, "-m", "recipes.train", *(f"{name}={value}" for name, value in options.items())]

    return {"ddp": of_script("ddp"), "hybrid": of_script("hybrid"), "recipes.train": of_recipe}


def seconds_to_first_step(command: Callable[[Path], list[str]], timeout: float = 300) -> float:
    """Runs a command to its end; the seconds from its start to the end of its first training step.

    Raises:
        RuntimeError: it ended without a step; the end of its output is in the message.
        TimeoutExpired: it did not end.
    """
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    environment.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "first_step"
        arguments = command(file)
        started = time.time()
        done = subprocess.run(
            arguments,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        if not file.exists():
            raise RuntimeError(
                f"{' '.join(arguments)} ended with {done.returncode} and no step:\n{done.stdout[-2000:]}"
            )
        return float(file.read_text()) - started
