"""A rank that is slower than those that do the same work is named, and no other."""

from __future__ import annotations

import gc
import random
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_dist.elastic import stacks
from lightning_dist.elastic.pulse import StepTimes
from lightning_dist.elastic.stragglers import Straggler, Stragglers
from tests.elastic.hanging import Points, burn, lag
from tests.support.parity import slow
from tests.support.ranks import run_on_ranks

# ---------------------------------------------------------------- from the times of steps


def _named(
    stages: list[tuple[int, ...]], slow: dict[int, tuple[float, float]], noise: float, seed: int = 0, num: int = 60
) -> list[tuple[int, Straggler]]:
    """Who is named, and after which batch.

    Args:
        stages: ranks that do the same work.
        slow: by rank, by what it is slower from batch 10 on, and the seconds in which it waits for data.
        noise: the most by which a step is longer than its work.
    """
    drawn, stragglers, named = random.Random(seed), Stragglers(stages), []
    for batch in range(1, num):
        for number, stage in enumerate(stages):
            for rank in stage:
                factor, data = slow.get(rank, (1.0, 0.0)) if batch >= 10 else (1.0, 0.0)
                own = 0.1 * (1 + number) * factor * (1 + noise * drawn.random())
                stragglers.add(rank, [StepTimes(batch, 0.3, own, 0.001 + data)])
        named += [(batch, straggler) for straggler in stragglers.found()]
    return named


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize(
    ("stages", "rank"), [([(0, 1)], 0), ([(0, 1, 2, 3)], 2), ([(0, 1), (2, 3)], 1), ([(0,), (1,)], 1)]
)
def test_one_that_is_slower_by_half_is_named_within_20_steps(
    stages: list[tuple[int, ...]], rank: int, noise: float
) -> None:
    ((batch, straggler),) = _named(stages, {rank: (1.5, 0.0)}, noise)
    assert (straggler.rank, straggler.loads) == (rank, False)
    assert straggler.batch == 10
    assert batch < 30
    assert straggler.alone == (len(stages[0]) == 1)


def test_a_slow_loader_is_named_as_one() -> None:
    ((_, straggler),) = _named([(0, 1, 2, 3)], {3: (1.0, 0.05)}, 0.2)
    assert (straggler.rank, straggler.loads) == (3, True)
    assert "rank 3 on there waits longer for its data than the other ranks" in straggler.sentence("there")


@pytest.mark.parametrize("noise", [0.3, 1.0])
@pytest.mark.parametrize("stages", [[(0, 1)], [(0, 1, 2, 3)], [(0,), (1,)]])
def test_noise_names_nobody(stages: list[tuple[int, ...]], noise: float) -> None:
    assert [_named(stages, {}, noise, seed, 300) for seed in range(3)] == [[], [], []]


def test_longer_batches_name_nobody() -> None:
    assert _named([(0,), (1,)], {0: (2.0, 0.0), 1: (2.0, 0.0)}, 0.2) == []


# ---------------------------------------------------------------- what a thread does


def test_where_a_thread_is_is_told_by_its_stack() -> None:
    event, points = threading.Event(), Points({0}.__contains__, 1.0)
    threads = [threading.Thread(target=points.__getitem__, args=(0,)), threading.Thread(target=event.wait)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    (first, frame), (second, other) = [(thread, stacks.frame_of(thread)) for thread in threads]
    assert frame is not None
    assert other is not None
    assert stacks.what_it_does(first, frame) == stacks.what_it_does(second, other) == stacks.OWN
    assert "hanging.py" in stacks.place(first, frame)
    event.set()
    for thread in threads:
        thread.join()


def _deep(depth: int, thread: threading.Thread) -> None:
    if depth:
        _deep(depth - 1, thread)
    else:
        thread.start()
        thread.join()


@pytest.mark.skipif(not stacks._COLLECTS_ANYWHERE, reason="later versions of Python collect between two instructions")
def test_no_garbage_is_collected_while_frames_are_looked_at() -> None:
    """One that ends there may let the thread run on whose frames they are."""
    found, main = list[str](), threading.current_thread()

    def look() -> None:
        thresholds = gc.get_threshold()
        gc.callbacks.append(note)
        gc.set_threshold(1)
        stacks.frame_of(main)
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(note)

    def note(phase: str, _: Any) -> None:
        found.append(phase)

    thread = threading.Thread(target=look)
    _deep(100, thread)
    assert len(found) < 10  # that before the look, and after it
    assert gc.get_threshold()[0] > 1


def test_a_frame_without_a_line_is_looked_at() -> None:
    frame: Any = SimpleNamespace(f_code=run_on_ranks.__code__, f_lineno=None, f_back=None)
    assert stacks.what_it_does(threading.current_thread(), frame) == stacks.OWN


# ---------------------------------------------------------------- in runs


@pytest.mark.parametrize(
    ("layout", "num_ranks", "how", "rank"),
    [
        slow("dp_replicate=2", 2, "computes", 1),
        slow("dp_replicate=2", 2, "sleeps", 0),
        slow("dp_replicate=2", 2, "loads", 1),
        slow("dp_shard=2", 2, "computes", 0),
        slow("dp_shard=2", 2, "sleeps", 1),
        slow("tp=2", 2, "sleeps", 1),
        slow("tp=2", 2, "computes", 0),
        slow("dp_shard=2,tp=2", 4, "sleeps", 3),
        slow("pp=2,dp_replicate=2", 4, "sleeps", 2),
    ],
)
def test_a_rank_that_lags_is_named(layout: str, num_ranks: int, how: str, rank: int) -> None:
    first, seconds = 8, 0.2
    lines, *others = run_on_ranks(num_ranks, lag, layout, rank, how, first, first + 25, seconds)
    assert len(lines) == 1, lines
    told, batch = lines[0]
    assert f"rank {rank} on " in told
    assert ("data" in told) == (how == "loads")
    assert batch <= first + 20
    assert not any(others)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "num_ranks"), [("dp_replicate=2", 2), ("dp_shard=2,tp=2", 4), ("pp=2", 2)])
def test_nobody_is_named_beside_other_work(layout: str, num_ranks: int) -> None:
    with burn():
        lines, *_ = run_on_ranks(num_ranks, lag, layout, None, "", 0, 500, 0.02, timeout=500)
    assert lines == []
