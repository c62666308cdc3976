"""A rank that sleeps for good ends the run on all ranks, and is named; so is a loader that stalls."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lightning_dist.elastic import WorkerFailed, launch
from lightning_dist.elastic.hangs import Hangs, Verdict
from lightning_dist.elastic.pulse import Wait
from tests.elastic import hanging
from tests.support.parity import slow
from tests.support.ranks import IMPORTED
from tests.support.scripts import ROOT, finish, gone, start

TIMEOUT = 4.0

# ---------------------------------------------------------------- what ranks say to each other


class Pulses:
    """A rank that waits in a collective, or does not, for some seconds."""

    def __init__(self, seconds: float, waits: bool) -> None:
        self.still, self.waits = seconds, waits

    def wait(self) -> Wait | None:
        return Wait("all_reduce over tp [0, 1]", self.still, 60.0) if self.waits else None

    def place(self) -> str:
        return "is in training_step (train.py:3 in fetch)"

    def stack(self) -> str:
        return "the stack"


def _ranks(*waits: bool, seconds: float) -> tuple[list[Pulses], list[Hangs]]:
    store = dist.HashStore()
    pulses = [Pulses(seconds, of_rank) for of_rank in waits]
    ranks = enumerate(pulses)
    return pulses, [Hangs(store, rank, len(waits), 60.0, pulse, lambda: "step 7") for rank, pulse in ranks]  # type: ignore[arg-type]


def _talk(hangs: list[Hangs], **arguments: Any) -> list[Verdict | None]:
    return [of_rank.talk(0.5, **arguments) for of_rank in hangs]


def test_ranks_ask_before_the_timeout_and_tell_when_it_is_over() -> None:
    pulses, hangs = _ranks(True, False, True, seconds=54.0)
    assert _talk(hangs) == [None, None, None]
    assert not any(of_rank.is_open for of_rank in hangs)
    for pulse in pulses:
        pulse.still = 56.0
    assert _talk(hangs) == [None, None, None]
    assert all(of_rank.is_open for of_rank in hangs)
    for pulse in pulses:
        pulse.still = 59.8
    assert _talk(hangs) == [None, None, None]
    verdicts = [verdict for verdict in _talk(hangs) if verdict is not None]
    assert len(verdicts) == 3
    assert all(verdict == verdicts[0] for verdict in verdicts)
    assert (verdicts[0].missing, verdicts[0].rank, verdicts[0].told_by) == ([1], 1, 0)
    assert verdicts[0].summary == (
        "did not come to all_reduce over tp [0, 1], step 7, in which rank 0 waited for 60 s: it is in training_step "
        "(train.py:3 in fetch), 60 s."
    )
    assert verdicts[0].stacks.count("the stack") == 3


def test_a_rank_that_comes_in_time_ends_the_round() -> None:
    pulses, hangs = _ranks(True, False, seconds=56.0)
    _talk(hangs)
    pulses[0].still, pulses[0].waits = 0.0, False
    assert [_talk(hangs) for _ in range(3)] == [[None, None]] * 3
    assert not any(of_rank.is_open for of_rank in hangs)
    pulses[0].still, pulses[0].waits = 59.9, True
    assert [_talk(hangs)[1] is None for _ in range(3)] == [True, True, False]  # the next round


def test_a_rank_that_its_backend_ended_first_tells_all_the_same() -> None:
    pulses, hangs = _ranks(True, False, seconds=56.0)
    _talk(hangs)
    pulses[0].still, pulses[0].waits = 0.0, False
    assert hangs[0].talk(0.5, failed=True) is None
    verdict = hangs[0].talk(0.5, failed=True)
    assert verdict is not None
    assert verdict.missing == [1]
    assert hangs[1].talk(0.5) == verdict


def test_one_that_does_not_answer_is_missing_and_ranks_that_wait_for_each_other_are_not() -> None:
    _, hangs = _ranks(True, True, False, seconds=59.9)
    *_, (verdict, _) = [_talk(hangs[:2]) for _ in range(3)]
    assert verdict is not None
    assert verdict.missing == [2]
    assert "does not answer" in verdict.summary
    _, hangs = _ranks(True, True, seconds=59.9)
    *_, (_, verdict) = [_talk(hangs) for _ in range(3)]
    assert verdict is not None
    assert (verdict.missing, verdict.rank) == ([], 0)
    assert "each for another" in verdict.summary


def test_a_rank_that_hears_nothing_ends_after_the_timeout() -> None:
    for seconds, overdue in ((59.9, False), (64.0, False), (66.0, True)):
        _, hangs = _ranks(True, True, seconds=seconds)
        assert (hangs[0].overdue() is not None) == overdue


# ---------------------------------------------------------------- in runs


def _launch(function: Callable[..., Any], *args: Any, num_ranks: int) -> list[Any]:
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    return launch(function, *args, num_processes=num_ranks, start_method="forkserver")


def _ended(folder: Path, where: str, layout: str, num_ranks: int, rank: int) -> str:
    """What a run that hangs is told as, once all its ranks have ended in time."""
    with pytest.raises(WorkerFailed) as error:
        _launch(hanging.hang, where, layout, rank, TIMEOUT, str(folder), num_ranks=num_ranks)
    told, ended = str(error.value), time.time()
    assert error.value.rank == rank, told
    slept = [path.read_text().split() for path in folder.glob("sleeps-*")]
    assert slept, told
    assert ended - min(float(since) for _, since in slept) < TIMEOUT + 10
    pids = [int(path.name.partition("-")[2]) for path in folder.glob("pid-*")]
    assert len(pids) == num_ranks
    assert all(map(gone, pids))
    return told


@pytest.mark.parametrize(
    ("layout", "num_ranks", "where", "rank"),
    [
        slow("dp_replicate=2", 2, "training", 1),
        slow("dp_replicate=2", 2, "validation", 0),
        slow("dp_replicate=2", 2, "set-up", 1),
        slow("dp_replicate=2", 2, "hook", 0),
        slow("dp_shard=2", 2, "training", 0),
        slow("dp_shard=2", 2, "save", 1),
        ("dp_shard=2", 2, "save", 0),
        slow("dp_shard=2", 2, "set-up", 0),
        slow("tp=2", 2, "training", 1),
        slow("tp=2", 2, "validation", 1),
        slow("tp=2", 2, "save", 0),
        slow("pp=2", 2, "training", 1),
        slow("pp=2", 2, "validation", 0),
        slow("pp=2", 2, "save", 1),
        slow("dp_shard=2,tp=2", 4, "training", 3),
        slow("pp=2,dp_replicate=2", 4, "training", 2),
    ],
)
def test_a_rank_that_sleeps_for_good_is_named_and_all_end(
    tmp_path: Path, layout: str, num_ranks: int, where: str, rank: int
) -> None:
    told = _ended(tmp_path, where, layout, num_ranks, rank)
    assert told.startswith(f"rank {rank} did not come to "), told
    summary, _, stacks = told.partition("\n\n")
    assert "hanging.py" in summary, told
    assert "in sleep" in summary, told
    place = {"set-up": ", set-up of fit, ", "validation": ", validate after training step "}
    assert place.get(where, ", training step ") in summary, told
    assert "time.sleep(3600)" in stacks, told
    assert all(f"rank {other} " in stacks for other in range(num_ranks)), told
    assert stacks.count("waits in ") == num_ranks - 1, told


@pytest.mark.slow
def test_a_loader_that_stalls_is_told_apart(tmp_path: Path) -> None:
    told = _ended(tmp_path, "data", "dp_replicate=2", 2, 1)
    assert "it waits for its data: DataLoader" in told.partition("\n\n")[0], told


@pytest.mark.slow
def test_a_stopped_rank_is_named_too(tmp_path: Path) -> None:
    told = _ended(tmp_path, "stopped", "dp_replicate=2", 2, 1)
    assert "does not answer" in told.partition("\n\n")[0], told


SCRIPT_TIMEOUT = 20.0
"""Within it the ranks must meet, and each starts its Python by itself."""
SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.elastic.hanging import hang

if __name__ == "__main__":
    hang("training", "dp_replicate=2", {rank}, {timeout}, {folder!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("torchrun", [False, True], ids=["script", "torchrun"])
def test_in_a_script_the_rank_that_waited_tells_once(tmp_path: Path, torchrun: bool, rank: int) -> None:
    text = SCRIPT.format(root=ROOT, rank=rank, timeout=SCRIPT_TIMEOUT, folder=str(tmp_path))
    process = start(tmp_path, torchrun=torchrun, text=text)
    status, output = finish(process, 240)
    assert status != 0
    assert output.count(f"\nrank {rank} did not come to ") == 1, output
    assert output.count("time.sleep(3600)") == 1, output
    assert all(gone(int(path.name.partition("-")[2])) for path in tmp_path.glob("pid-*"))


def test_a_rank_that_comes_late_is_no_hang(tmp_path: Path) -> None:
    """Later than when the ranks begin to ask each other."""
    assert _launch(hanging.come_late, 0.87 * TIMEOUT, TIMEOUT, num_ranks=2) == [16, 16]
