"""Runs of ``script.py``, under ``lightning-dist run`` or ``launch``, and what they saw."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lightning_dist.elastic import WorkerFailed, launch
from tests.elastic import script
from tests.faults.strikes import MARK, wait_until_gone
from tests.support.ranks import IMPORTED

ROOT = Path(__file__).parents[2]
COMMAND = "import sys; from lightning_dist.cli import main; sys.exit(main())"


def run(folder: Path, *, max_restarts: int = 3, **options: Any) -> tuple[bool, str]:
    """Launches the ranks from here, which is faster; whether they came to their end, and what they printed."""
    folder.mkdir()
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    how: dict[str, Any] = {"max_restarts": max_restarts, "start_method": "forkserver"}
    failed = ""
    try:
        launch(script.main_apart, folder, options, num_processes=options["ranks"], **how)
    except WorkerFailed as error:
        failed = str(error)
    assert not Path((folder / "directory").read_text() or "/nowhere").exists()
    return not failed, (folder / "log").read_text() + failed


def start(folder: Path, *, max_restarts: int, **options: Any) -> subprocess.Popen[str]:
    """``options`` of the script: ``layout``, ``ranks``, ``steps`` of each fit, ``every`` how many a save, ..."""
    folder.mkdir()
    ours = ("RANK", "WORLD", "LOCAL_", "TORCHE", "LIGHTNING_DIST_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), MARK: str(folder)}
    command = ["run", "--nproc", str(options["ranks"]), "--max-restarts", str(max_restarts)]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *command, script.__file__, str(folder), json.dumps(options)],
            env=clean,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )


def end(run: subprocess.Popen[str], folder: Path, seconds: float = 180) -> str:
    """Waits for the end of a run; what it printed. Nothing of it may be left."""
    try:
        run.wait(seconds)
    finally:
        run.kill()
        left = wait_until_gone(str(folder), 20)
        for pid in left:
            os.kill(pid, 9)
    text = (folder / "log").read_text()
    assert not left, f"processes {left} are left\n{text[-2000:]}"
    directory = (folder / "directory").read_text() if (folder / "directory").exists() else ""
    assert not directory or not Path(directory).exists()
    return text


def notes(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """All steps that ranks noted, in the order of time."""
    found = []
    for rank in range(ranks):
        lines = (folder / f"steps-{rank}.jsonl").read_text().splitlines()
        found += [{"rank": rank, **json.loads(line)} for line in lines]
    return sorted(found, key=lambda note: note["time"])


def kept(folder: Path, ranks: int) -> dict[tuple[int, int, int], dict[str, Any]]:
    """By rank, fit and step: the last time that it was taken."""
    return {(note["rank"], note["fit"], note["step"]): note for note in notes(folder, ranks)}


def assert_equal(folder: Path, reference: Path, ranks: int) -> None:
    """Samples of every kept step, losses and final weights."""
    found, expected = kept(folder, ranks), kept(reference, ranks)
    assert found.keys() == expected.keys()
    for key, note in expected.items():
        assert found[key]["samples"] == note["samples"], key
        assert abs(found[key]["loss"] - note["loss"]) <= 1e-5, (key, found[key]["loss"], note["loss"])
    weights, wanted = (torch.load(where / "final.pt") for where in (folder, reference))
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)


def assert_epochs_are_whole(folder: Path, ranks: int) -> None:
    """Every sample of a data set once in each epoch of the kept steps, but for the last one, over the data ranks."""
    batches = {(n["fit"], n["epoch"], n["data_rank"], n["step"]): n["samples"] for n in kept(folder, ranks).values()}
    epochs: dict[tuple[int, int], list[int]] = {}
    for (fit, epoch, *_), samples in batches.items():
        epochs.setdefault((fit, epoch), []).extend(samples)
    last = {fit: epoch for fit, epoch in sorted(epochs)}
    for (fit, epoch), samples in epochs.items():
        assert epoch == last[fit] or sorted(samples) == list(range(script.SIZE)), (fit, epoch, sorted(samples))
        assert len(set(samples)) == len(samples)


def lost_steps(folder: Path, ranks: int) -> list[int]:
    """At each restart of a fit: steps that had been taken, and were taken again."""
    lost: list[int] = []
    reached: dict[int, int] = {}
    attempts: dict[int, int] = {}
    for note in notes(folder, ranks):
        fit = note["fit"]
        if fit in attempts and note["attempt"] != attempts[fit]:
            lost.append(reached[fit] - (note["step"] - 1))
            reached[fit] = note["step"]
        attempts[fit] = note["attempt"]
        reached[fit] = max(reached.get(fit, 0), note["step"])
    return lost
