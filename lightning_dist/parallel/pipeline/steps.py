"""A step of a pipeline: the way that it goes through the stages, and a batch that is on it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_dist.parallel.pipeline import batches, by_hand
from lightning_dist.parallel.pipeline.cuts import CutPoint
from lightning_dist.parallel.pipeline.failures import Failure
from lightning_dist.parallel.pipeline.passage import Ghost, Passage
from lightning_dist.parallel.pipeline.trace import Trace
from lightning_dist.parallel.pipeline.wire import Wire


class Route:
    """A step on microbatches of one shape: where it is cut, and how each stage runs it."""

    def __init__(self, points: list[CutPoint], passages: list[Passage], trace: Trace) -> None:
        self.points, self.passages = points, passages
        self.written = trace.written
        self.attributes = set(trace.attributes)
        self.asked = trace.asked
        self.called = {call.name for call in trace.calls}
        self._trace = trace

    @cached_property
    def ghost(self) -> Ghost:
        """The step without its modules; for a manual one."""
        return Ghost(self._trace)

    @property
    def holds(self) -> bool:
        """Whether the step would go the same way now; see [Note: a path that changes]."""
        try:
            return all(question() == answer for question, answer in self.asked)
        except (AttributeError, LookupError):  # what was asked of is gone
            return False


class Step:
    """A batch on its way through the pipeline."""

    def __init__(
        self,
        name: str = "",
        parts: list[Any] | None = None,
        rest: tuple[Any, ...] = (),
        sizes: list[int] | None = None,
        weights: list[float] | None = None,
        routes: list[Route] | None = None,
        wires: list[Wire] | None = None,
        logs: Any = None,
        batch: Any = None,
    ) -> None:
        self.name, self.parts, self.rest, self.logs = name, parts or [], rest, logs
        self.batch = batch
        self.sizes, self.weights, self.routes, self.wires = sizes or [], weights or [], routes or [], wires or []
        self.outputs: list[Any] = [None] * len(self.parts)
        self.appended: Any = None
        self.kept: Any = None
        self.attributes: dict[tuple[str, str], Any] = {}
        """Numbers that modules keep, before the step."""
        self.seed = 0
        self.failure: Failure | None = None
        self.is_manual = False
        self._hidden: by_hand.HiddenGradients | None = None
        self.losses: dict[int, Tensor] = {}
        """What microbatches gave to ``manual_backward``."""
        self.index = 0
        """Of the microbatch that runs."""
        self.alike = False
        """Whether all microbatches begin with the same random numbers."""
        self.trained: dict[int, list[nn.Parameter]] = {}
        """Parameters of each stage of this rank, once a schedule asked."""

    def take(self, loss: Tensor) -> None:
        """The microbatch that runs called ``manual_backward``."""
        if self.index in self.losses:
            raise RuntimeError(by_hand.SEVERAL.format(number="several"))
        self.losses[self.index] = loss
        self.logs.takes_unknown = True
        assert self._hidden is not None
        self._hidden.show()

    def hide_gradients(self, module: pl.LightningModule) -> AbstractContextManager[Any]:
        """Around a microbatch of a manual step."""
        self._hidden = by_hand.HiddenGradients(module) if self.is_manual else None
        return self._hidden or nullcontext()

    @property
    def manual_loss(self) -> Tensor | None:
        """Of the batch, where the step gave one to ``manual_backward``."""
        if not self.losses:
            return None
        return batches.weighted_mean([self.losses[index].detach() for index in sorted(self.losses)], self.weights)

    def joined(self) -> Any:
        """What the microbatches' steps returned, as one."""
        return batches.joined(self.outputs, self.sizes, self.weights)
