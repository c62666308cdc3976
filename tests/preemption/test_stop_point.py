"""Ranks that take batches without agreeing after each stop after the same one, whoever is asked and when."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
import torch.distributed as dist

from lightning_dist.elastic import stop_point
from lightning_dist.elastic.stop_point import StopPoint

RANKS, BATCHES = 3, 12


def batches_done(store: Any, key: str, rank: int, asked: dict[int, int], meets: Any, draw: random.Random) -> int:
    """Of one rank, which is asked at a batch or not at all; ``meets`` is a barrier in batches that communicate."""
    point = StopPoint(store, key, rank, RANKS)
    for done in range(1, BATCHES + 1):
        if meets is not None and done % 3:
            meets.wait(20)
        time.sleep(draw.random() * 1e-3)
        if point.is_reached(done, done == BATCHES, done >= asked.get(rank, BATCHES + 1)):
            return done
    return BATCHES


@pytest.mark.parametrize("meet", [False, True])
def test_all_stop_after_the_same_batch(meet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_point, "POLL", 2e-3)
    draw, stopped = random.Random(3), 0
    for number in range(60):
        store = dist.HashStore()
        asked = {rank: draw.randrange(1, BATCHES) for rank in draw.sample(range(RANKS), draw.randrange(1, RANKS + 1))}
        meets = threading.Barrier(RANKS) if meet else None
        seeds = [random.Random(draw.random()) for _ in range(RANKS)]
        with ThreadPoolExecutor(RANKS) as pool:
            calls = [
                pool.submit(batches_done, store, str(number), rank, asked, meets, seeds[rank]) for rank in range(RANKS)
            ]
            done = {call.result(30) for call in calls}
        assert len(done) == 1, (asked, done)
        stopped += done != {BATCHES}
    assert stopped > 20  # else little was tested


def test_nobody_stops_whom_nobody_asks() -> None:
    point = StopPoint(dist.HashStore(), "a", 0, 1)
    assert not any(point.is_reached(done, False, False) for done in range(5))


class Interrupted:
    """A store at which something else happens once a key was read."""

    def __init__(self, key: str) -> None:
        self.store, self.key, self.happens = dist.HashStore(), key, lambda: None

    def get(self, key: str) -> bytes:
        value = self.store.get(key)
        if key == self.key:
            self.happens()
        return value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def test_a_rank_that_goes_on_while_the_talks_close_stops_with_the_others() -> None:
    store = Interrupted("a/0")
    first, second = StopPoint(store, "a", 0, 2), StopPoint(store, "a", 1, 2)
    assert not first.is_reached(1, False, True)
    with ThreadPoolExecutor(1) as pool:
        calls = []

        def go_on() -> None:
            if not calls:
                calls.append(pool.submit(lambda: next(n for n in range(2, 9) if first.is_reached(n, False, True))))
                wait(calls, timeout=0.3)

        store.happens = go_on
        stopped = next(n for n in range(1, 9) if second.is_reached(n, False, True))
        assert calls[0].result(10) == stopped
