"""A rank that is slower than the others: found by each rank's own time of a step, and named on rank 0.

[Note: whose time a step takes]
Ranks that wait for each other all have the same time for a step. So each looks at its own: what is left of the step
where it waits neither for other ranks nor for its data, nor for a core of a machine that has others to run. A rank is
compared with those that do the same work: of its stage under ``pp``. Those that are alone in their stages are compared
with themselves as they were at first, and with each other in how much longer they take.

Single steps are noisy. Over a window of :data:`WINDOW` steps a rank is slow if it took :data:`SLOWER` times their
median in the middle, and was slower in all but one of them, by a share of the step that matters; and in the window
before as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from statistics import median, median_low

from lightning_dist.elastic.pulse import StepTimes

WINDOW = 7
"""Steps."""
SLOWER = 1.25
"""In the middle of a window."""
SLOWER_EACH = 1.2
MOST = 6
"""Of a window's steps."""
SHARE = 0.08
"""Of a step's whole time."""
FIRST = 6 * WINDOW
"""Steps with which a rank is compared that is alone in its stage; as many as there are before the windows."""
WARM_UP = 3
"""First steps of a run, which compile and allocate."""
KEPT = 128
"""Steps that are remembered of each rank."""


@dataclass(frozen=True)
class Straggler:
    """A rank that is slower than others.

    Attributes:
        rank: the one.
        loads: whether it waits for its data longer, else it computes longer.
        seconds, usual: of a step, of the rank and of those that it is compared with.
        batch: the first of the run's batches that was slow.
        alone: whether it is compared with itself, as it was.
    """

    rank: int
    loads: bool
    seconds: float
    usual: float
    batch: int
    alone: bool

    def sentence(self, host: str) -> str:
        """For the log."""
        than = "itself before" if self.alone else "the other ranks that do the same work"
        times = f"{self.seconds * 1e3:.0f} ms a step, {self.usual * 1e3:.0f} ms"
        if self.loads:
            does = f"waits longer for its data than {than} ({times} there): its loader is slow, or what it reads from"
        else:
            slower = self.seconds / max(self.usual, 1e-9)
            does = f"is {slower:.2f} x as slow as {than} ({times} there, without what it waits for other ranks)"
        return f"straggler: rank {self.rank} on {host} {does}, since training batch {self.batch}"


class Stragglers:
    """What rank 0 knows of the steps of all ranks.

    Args:
        stages: ranks that do the same work, together.
    """

    def __init__(self, stages: Iterable[tuple[int, ...]]) -> None:
        self._stages = list(stages)
        self._steps: dict[int, dict[int, StepTimes]] = {rank: {} for stage in self._stages for rank in stage}
        self._before: dict[tuple[int, bool], float] = {}
        """Of a rank that is alone in its stage, as it was at first."""
        self._named: set[tuple[int, bool]] = set()
        self._last = 0

    def add(self, rank: int, steps: Iterable[StepTimes]) -> None:
        """Steps of a rank; those that are known already may be among them."""
        known = self._steps[rank]
        known.update((step.batch, step) for step in steps if step.batch > WARM_UP)
        for batch in sorted(known)[:-KEPT]:
            del known[batch]

    def found(self) -> list[Straggler]:
        """Ranks that are slow, and were not a while ago."""
        batches = sorted(set.intersection(*(set(steps) for steps in self._steps.values())))
        if len(batches) < 2 * WINDOW or batches[-1] < self._last + WINDOW // 2:
            return []
        self._last = batches[-1]
        cases = [(stage, loads) for stage in self._stages for loads in (False, True)]
        every = (self._look(rank, loads, stage, batches) for stage, loads in cases for rank in stage)
        return [straggler for straggler in every if straggler is not None]

    def _look(self, rank: int, loads: bool, stage: tuple[int, ...], batches: list[int]) -> Straggler | None:
        last = batches[-2 * WINDOW :]
        usual = self._usual(stage, loads, batches)
        slow = [self._is_slow(rank, loads, batch, usual(batch)) for batch in last]
        if sum(slow[WINDOW:]) <= WINDOW - MOST:
            self._named.discard((rank, loads))
        times = [_seconds(self._steps[rank][batch], loads) / max(usual(batch), 1e-9) for batch in last]
        windows = slice(WINDOW), slice(WINDOW, None)
        is_slow = all(sum(slow[window]) >= MOST and median(times[window]) > SLOWER for window in windows)
        if not is_slow or (rank, loads) in self._named:
            return None
        self._named.add((rank, loads))
        since = last[slow.index(True)]
        for batch in reversed([batch for batch in batches if batch < since]):
            if not self._is_slow(rank, loads, batch, usual(batch)):
                break
            since = batch
        seconds = median(_seconds(self._steps[rank][batch], loads) for batch in last)
        return Straggler(rank, loads, seconds, median(map(usual, last)), since, len(stage) == 1)

    def _usual(self, stage: tuple[int, ...], loads: bool, batches: list[int]) -> Callable[[int], float]:
        """Gives the seconds of a batch that the ranks of a stage are compared with."""
        if len(stage) == 1:
            before = self._at_first(stage[0], loads, batches)
            return lambda batch: before * self._growth(loads, batches, batch)

        @cache
        def of(batch: int) -> float:
            return median_low(_seconds(self._steps[peer][batch], loads) for peer in stage)

        return of

    def _at_first(self, rank: int, loads: bool, batches: list[int]) -> float:
        if (rank, loads) in self._before:
            return self._before[rank, loads]
        first = batches[: min(max(len(batches) - 2 * WINDOW, WINDOW), FIRST)]
        usual = max(median(_seconds(self._steps[rank][batch], loads) for batch in first), 1e-3)
        if len(first) == FIRST:
            self._before[rank, loads] = usual
        return usual

    def _growth(self, loads: bool, batches: list[int], batch: int) -> float:
        """By what ranks that are alone in their stages take longer than at first: batches may have become longer."""
        alone = [stage[0] for stage in self._stages if len(stage) == 1]
        return median_low(_seconds(self._steps[r][batch], loads) / self._at_first(r, loads, batches) for r in alone)

    def _is_slow(self, rank: int, loads: bool, batch: int, usual: float) -> bool:
        step = self._steps[rank][batch]
        seconds = _seconds(step, loads)
        return seconds > SLOWER_EACH * usual and seconds - usual > SHARE * step.whole


def _seconds(step: StepTimes, loads: bool) -> float:
    return step.data if loads else step.own
