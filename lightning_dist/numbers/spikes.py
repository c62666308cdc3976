"""Numbers of a training far above those before, by a median that single ones don't move."""

from __future__ import annotations

from collections import deque
from statistics import median

from lightning_dist.numbers.options import Spikes

TO_DEVIATION = 1.4826
"""From the median distance from the median to the standard deviation, of normal numbers."""
LEAST_SPREAD = 0.02
"""Of the median: numbers that hardly differ have no spread to speak of."""


class RunningMedian:
    """The last numbers of a kind, and whether another one is far above them; see :class:`Spikes`."""

    def __init__(self, spikes: Spikes) -> None:
        self._spikes = spikes
        self._last = deque[float](maxlen=spikes.window)
        self._num_seen = 0

    def is_far_above(self, value: float) -> bool:
        """Whether a number is a spike: never before the warm-up has ended."""
        if self._num_seen < self._spikes.warmup:
            return False
        middle = median(self._last)
        spread = max(TO_DEVIATION * median(abs(x - middle) for x in self._last), LEAST_SPREAD * abs(middle))
        return not value <= middle + self._spikes.threshold * spread  # nan is

    def add(self, value: float) -> None:
        """It is one of the last numbers now."""
        self._last.append(value)
        self._num_seen += 1


class SpikeWatch:
    """Looks at the loss and the norm of each step of one optimizer."""

    def __init__(self, spikes: Spikes) -> None:
        self._spikes = spikes
        self.forget()

    def forget(self) -> None:
        """Begins anew, with a warm-up."""
        self._medians = RunningMedian(self._spikes), RunningMedian(self._spikes)

    def is_spike(self, loss: float | None, norm: float) -> bool:
        """Whether one of the numbers of a step is far above those before."""
        return any(running.is_far_above(value) for running, value in self._pairs(loss, norm))

    def add(self, loss: float | None, norm: float) -> None:
        """The step was taken."""
        for running, value in self._pairs(loss, norm):
            running.add(value)

    def _pairs(self, loss: float | None, norm: float) -> list[tuple[RunningMedian, float]]:
        of_loss, of_norm = self._medians
        pairs = [] if loss is None else [(of_loss, loss)]
        return [*pairs, (of_norm, norm)] if self._spikes.norms else pairs
