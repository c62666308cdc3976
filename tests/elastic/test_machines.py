"""Two machines of two ranks: one is cut off, the other goes on, and takes it back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_dist.elastic import attempt
from tests.elastic import on_machines
from tests.elastic.runs import COMMAND, ROOT
from tests.faults.strikes import MARK, processes_of, wait_until_gone
from tests.support.machines import STORE, Network
from tests.support.parity import once
from tests.support.ranks import run_on_ranks

OPTIONS = {"layout": "dp_replicate=4", "pause": 0.1, "steps": 40}


def _train(folder: Path, options: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(attempt.DIRECTORY, str(folder))
        patch.setenv(attempt.FIRST_RANKS, "4")
        on_machines.main(folder, {**options, "pause": 0.0, "devices": 4})


def _uninterrupted(folder: str, options: dict[str, Any]) -> dict[int, tuple[list[int], float]]:
    Path(folder).mkdir()
    run_on_ranks(4, _train, Path(folder), options)
    return steps_of(Path(folder))


def notes_of(folder: Path) -> list[dict[str, Any]]:
    lines = [line for file in folder.glob("batches-*.jsonl") for line in file.read_text().splitlines()]
    return sorted((json.loads(line) for line in lines), key=lambda note: note["time"])


def steps_of(folder: Path) -> dict[int, tuple[list[int], float]]:
    """Samples and loss of each step, as it was taken last."""
    last: dict[int, Any] = {}
    by_attempt: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for note in notes_of(folder):
        key = note["step"], note["master"], note["world"]
        by_attempt[key].append(note)
        last[note["step"]] = key
    steps = {}
    for step, key in sorted(last.items()):
        notes = by_attempt[key]
        samples = sorted(sample for note in notes for sample in note["samples"])
        steps[step] = samples, sum(note["loss"] for note in notes) / key[2]
    return steps


class Run:
    """Of ``on_machines.py`` on the machines of a network."""

    def __init__(self, network: Network, folder: Path, options: dict[str, Any]) -> None:
        self.network, self.folder, self.options = network, folder, options
        ours = ("RANK", "WORLD", "LOCAL_", "TORCHE", "LIGHTNING_DIST_")
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self._environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), MARK: str(folder)}
        self._environment |= {"GLOO_SOCKET_IFNAME": "eth0"}
        self.store = self._start(network.at_store(), "store", ["store"])
        self.agents = [self.start_on(machine) for machine in range(len(network.machines))]

    def _start(self, where: list[str], name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"log-{name}").open("ab") as log:
            command = [*where, sys.executable, "-c", COMMAND, *arguments]
            return subprocess.Popen(command, env=self._environment, stdout=log, stderr=subprocess.STDOUT)

    def start_on(self, machine: int) -> subprocess.Popen[bytes]:
        meet = ["--nnodes", "1:2", "--rdzv-endpoint", f"{STORE}:29400", "--rdzv-id", "run"]
        script = [str(Path(on_machines.__file__)), str(self.folder), json.dumps(self.options)]
        return self._start(self.network.on(machine), f"{machine}", ["run", "--nproc", "2", *meet, *script])

    def wait_for_step(self, after: float, world: int, steps: int = 1, seconds: float = 200) -> float:
        """Until so many steps were taken after a moment, with so many ranks; the time of the first."""

        def taken() -> list[float]:
            notes = [note for note in notes_of(self.folder) if note["time"] > after and note["world"] == world]
            first: dict[int, float] = {}
            for note in notes:
                first.setdefault(note["step"], note["time"])
            return sorted(first.values())

        self._wait(lambda: len(taken()) >= steps, seconds, f"{steps} steps of {world} ranks")
        return taken()[0]

    def _wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no {what} in {seconds:g} s\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(f"{file.name}:\n{file.read_text()[-3000:]}" for file in self.folder.glob("log-*"))

    def end(self, seconds: float) -> None:
        """Waits for the agents to end by themselves, with all that they started."""
        try:
            for agent in self.agents:
                agent.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run did not end\n{self.logs()}") from None
        finally:
            self.store.terminate()
            self.store.wait(10)
            left = wait_until_gone(str(self.folder), 5)
            for pid in processes_of(str(self.folder)):
                os.kill(pid, 9)
        assert not left, self.logs()
        assert [agent.returncode for agent in self.agents] == [0] * len(self.agents), self.logs()


def go_through_cuts(folder: Path, cuts: list[int], options: dict[str, Any]) -> list[tuple[float, float]]:
    """Cuts one machine off after the other; seconds to the next step without it, and to the next with it again."""
    expected = once(_uninterrupted, str(folder / "whole"), options)
    (folder / "cut").mkdir()
    times = []
    with Network(2) as network:
        run = Run(network, folder / "cut", options)
        try:
            run.wait_for_step(0, 4, 3)
            for machine in cuts:
                network.cut(machine)
                cut = time.time()
                without = run.wait_for_step(cut + 1, 2, 3) - cut
                network.join(machine)
                joined = time.time()
                times.append((without, run.wait_for_step(joined, 4, 3) - joined))
        finally:
            run.end(120)
    found = steps_of(folder / "cut")
    assert found.keys() == expected.keys()
    for step, (samples, loss) in expected.items():
        assert found[step][0] == samples, step
        assert abs(found[step][1] - loss) <= 1e-4, step
    return times


@pytest.mark.slow
def test_a_machine_that_is_cut_off_is_gone_on_without_and_taken_back(tmp_path: Path) -> None:
    go_through_cuts(tmp_path, [1], OPTIONS)


@pytest.mark.slow
def test_machines_are_cut_off_three_times_in_a_row(tmp_path: Path) -> None:
    print(go_through_cuts(tmp_path, [1, 0, 1], {**OPTIONS, "steps": 120}))
