"""Competitors take turns in short bursts of steps, so that a machine whose clock swings is fair to all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from recipes.benchmark.device import rank_device, synchronize

Pace = Callable[[Tensor], None]
Weights = Callable[[], Mapping[str, Tensor]]
Competitor = Callable[[Pace, int], Weights]
"""Runs a given number of training steps and calls ``pace(loss)`` after each; returns what gives the weights, whole, by
name: a collective call."""


def no_pace(loss: Tensor) -> None:
    """Nobody waits for this competitor."""


def interleave(
    competitors: Mapping[str, Competitor],
    rounds: int,
    steps: int,
    warmup: int,
    on_burst: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[list[float]]]:
    """Seconds per step of every competitor, by name: ``rounds`` lists of ``steps``.

    [Note: taking turns]
    Each competitor runs in a thread of its own from its setup to its end, so that a Trainer keeps its state; but only
    one of them runs at a time, on every rank the same one: ``pace`` returns when it is the competitor's turn. So
    they share the process group, and the clock that a machine happens to have. Rounds go A B, B A, A B, ...; a burst
    begins with a barrier.

    Args:
        competitors: by name. Each runs ``warmup + rounds * steps`` steps.
        rounds: bursts of every competitor.
        steps: of a burst.
        warmup: steps that are not measured, setup included; at least 1.
        on_burst: called after every burst.
        clock: in seconds; ``time.process_time`` counts what this rank's threads compute, not what they wait for.

    Raises:
        ValueError: a number is too small.
        Exception: what a competitor raised.

    The device is waited for before the clock is read.

    Communication: one barrier per burst over the world, where there is a process group.
    """
    if min(rounds, steps, warmup) < 1:
        raise ValueError(f"rounds={rounds}, steps={steps}, warmup={warmup}: each has to be at least 1")
    total = warmup + rounds * steps
    turns = {name: _Turns(competitor, total, clock) for name, competitor in competitors.items()}
    for turn in turns.values():
        turn.take(warmup)
    bursts = alternate(turns, rounds, steps, on_burst)
    for turn in turns.values():
        turn.end()
    return bursts


T = TypeVar("T", covariant=True)


class TakesTurns(Protocol[T]):
    """Runs a burst of so many steps when it is told to, and tells what they took."""

    def take(self, steps: int) -> T:
        """The burst."""
        ...


def alternate(
    turns: Mapping[str, TakesTurns[T]], rounds: int, steps: int, on_burst: Callable[[], None] = lambda: None
) -> dict[str, list[T]]:
    """What the bursts took, by name: rounds go A B, B A, A B, ...

    Args:
        turns: by name.
        rounds, steps, on_burst: as of :func:`interleave`.
    """
    bursts: dict[str, list[T]] = {name: [] for name in turns}
    for number in range(rounds):
        for name in list(turns) if number % 2 == 0 else list(turns)[::-1]:
            bursts[name].append(turns[name].take(steps))
            on_burst()
    return bursts


class _Turns:
    """One competitor's thread. See [Note: taking turns]."""

    def __init__(self, competitor: Competitor, num_steps: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._mine, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._left, self._last, self._seconds = 0, 0.0, [0.0]
        self._device = rank_device() if dist.is_initialized() else torch.device("cpu")
        # a daemon: when another competitor raises, this one never gets its turn again
        self._thread = threading.Thread(target=self._run, args=(competitor, num_steps), daemon=True)
        self._thread.start()

    def take(self, steps: int) -> list[float]:
        """Lets the competitor run so many steps; their seconds."""
        self._left, self._seconds = steps, []
        self._hand_over()
        if len(self._seconds) < steps:
            raise ValueError(f"a competitor ended after {len(self._seconds)} of the {steps} steps of its burst")
        return self._seconds

    def end(self) -> None:
        """Lets the competitor go on from its last step to its end."""
        self._hand_over()
        self._thread.join()

    def _hand_over(self) -> None:
        self._mine.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def _run(self, competitor: Competitor, num_steps: int) -> None:
        if self._device.type != "cpu":
            torch.accelerator.set_device_index(self._device)  # that of a thread is the first
        self._wait()
        try:
            competitor(self._pace, num_steps)
        except BaseException as error:
            self._error = error
        finally:
            self._back.release()

    def _pace(self, loss: Tensor) -> None:
        synchronize()
        now = self._clock()
        self._seconds.append(now - self._last)
        self._last = now
        self._left -= 1
        if self._left == 0:
            self._back.release()
            self._wait()

    def _wait(self) -> None:
        self._mine.acquire()
        if dist.is_initialized():
            dist.barrier()
        synchronize()
        self._last = self._clock()
