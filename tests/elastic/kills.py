"""A random rank is killed at a random moment, many times in one run: ``python -m tests.elastic.kills 100``.

The run has to end by itself, with the samples, losses and weights of one that nobody killed.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from pathlib import Path

from tests.elastic import runs
from tests.faults.strikes import kill_at_random

LAYOUTS = {"dp_shard=2,tp=2": 4, "pp=2,dp_replicate=2": 4, "dp_shard=2": 2}
EVERY = 4


def kill_many(
    count: int,
    layout: str,
    folder: Path,
    *,
    steps: int,
    longest: float,
    seed: int = 0,
    snapshots: int | None = None,
    device: str = "cpu",
) -> tuple[int, list[int], list[float], dict[str, float]]:
    """How many were killed, the steps lost each time, the seconds from each kill to the next finished step, and the
    median of each part of a restart that the log tells.

    Args:
        count: of kills, if the run does not end before.
        steps: of the training.
        longest: up to how many seconds after a rank's script has begun it is killed.
        snapshots: every how many steps one is taken in memory; no more than those are lost.
        device: of the ranks: "cpu" or "cuda", where they take the GPUs that there are, several to one.
    """
    ranks = LAYOUTS[layout]
    options = {"layout": layout, "ranks": ranks, "steps": [steps], "every": EVERY, "pause": 0.02}
    options |= {"snapshots": snapshots, "device": device}
    assert runs.run(folder / "reference", max_restarts=0, **options)[0]
    run = runs.start(folder / "killed", max_restarts=10 * count, **options)
    try:
        times = kill_at_random(run, folder / "killed", count=count, num_ranks=ranks, longest=longest, seed=seed)
    finally:
        log = runs.end(run, folder / "killed", 600)
    assert run.returncode == 0, log[-3000:]
    runs.assert_equal(folder / "killed", folder / "reference", ranks)
    runs.assert_epochs_are_whole(folder / "killed", ranks)
    lost = runs.lost_steps(folder / "killed", ranks)
    assert max(lost, default=0) <= (snapshots or EVERY), lost
    steps_at = [note["time"] for note in runs.notes(folder / "killed", ranks)]
    after = [next((at for at in steps_at if at > killed), None) for killed in times]
    seconds = [at - killed for at, killed in zip(after, times, strict=True) if at is not None]
    return len(times), lost, seconds, _parts(log)


def _parts(log: str) -> dict[str, float]:
    told = re.findall(r"first one again: .*\((.*)\)", log)
    every = [dict(re.findall(r"([a-z ]+?) ([\d.]+)", line)) for line in told]
    return {part.strip(): statistics.median(float(one[part]) for one in every) for part in every[0]} if every else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--layout", choices=LAYOUTS, default="dp_shard=2,tp=2")
    parser.add_argument("--steps", type=int, help="of the training (default: 5 a kill)")
    parser.add_argument("--longest", type=float, default=6.0, help="seconds to a kill, at most")
    parser.add_argument("--snapshots", type=int, help="take one in memory every so many steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--folder", type=Path, help="for what the runs write, which is kept (default: it is not)")
    options = parser.parse_args()
    began = time.time()
    steps = options.steps or 5 * options.count
    with tempfile.TemporaryDirectory() as where:
        where = options.folder or where
        rest = {"steps": steps, "longest": options.longest, "seed": options.seed, "snapshots": options.snapshots}
        rest["device"] = options.device
        num_kills, lost, seconds, parts = kill_many(options.count, options.layout, Path(where), **rest)
    print(
        f"{options.layout}: {num_kills} kills in {steps} steps, {time.time() - began:.0f} s; steps lost: {sum(lost)}, "
        f"at once at most {max(lost, default=0)}; from a kill to the next step: median "
        f"{statistics.median(seconds):.1f} s, at most {max(seconds):.1f} s; "
        f"medians of parts: {parts}"
    )


if __name__ == "__main__":
    main()
