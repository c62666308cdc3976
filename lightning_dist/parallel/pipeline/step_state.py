"""A batch on its way through the pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_dist.logs.microbatches import RecordedLogs
from lightning_dist.parallel.pipeline import manual_optimization
from lightning_dist.parallel.pipeline.failures import Failure
from lightning_dist.parallel.pipeline.joined_outputs import joined, weighted_mean
from lightning_dist.parallel.pipeline.p2p import P2PTensors
from lightning_dist.parallel.pipeline.stage_plans import StagePlan
from lightning_dist.parallel.pipeline.step_effects import StepEffects


@dataclass(frozen=True)
class SplitBatch:
    """A batch in microbatches.

    Args:
        whole: the batch.
        others: the step's other arguments, the batch's index first where it takes one.
        parts: the microbatches.
        sizes: how many samples each has.
    """

    whole: Any
    others: tuple[Any, ...]
    parts: list[Any]
    sizes: list[int]

    def unsplit(self) -> SplitBatch:
        """The batch as one microbatch."""
        return SplitBatch(self.whole, self.others, [self.whole], [sum(self.sizes)])


class StepInFlight:
    """A step over the microbatches of a batch, from its begin until all ranks have what it returned.

    Args:
        module: whose step it is.
        name: of the step.
        batch: in microbatches.
        weights: what each microbatch counts in means.
        plans: of each microbatch.
        logs: takes what microbatches log.
        alike: all microbatches begin with the same random numbers.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        name: str,
        batch: SplitBatch,
        weights: list[float],
        plans: list[StagePlan],
        logs: RecordedLogs,
        alike: bool = False,
    ) -> None:
        self.name, self.batch, self.weights, self.plans, self.logs, self.alike = (
            name,
            batch,
            weights,
            plans,
            logs,
            alike,
        )
        self.module = module
        self.kind = name, module.training, batch.others[1:]
        """What steps have in common that are compared once: the name, the mode, and the loader's index."""
        self.is_manual = name == "training_step" and not module.automatic_optimization
        self.p2p = [P2PTensors.of([plan.points[at] for plan in plans]) for at in range(len(plans[0].points))]
        """What travels between each two stages."""
        self.effects = StepEffects(module, {place for plan in plans for place in plan.attributes})
        self.outputs: list[Any] = [None] * len(batch.parts)
        self.losses: dict[int, Tensor] = {}
        """What microbatches gave to ``manual_backward``."""
        self.seed = 0
        self.loss_scale = 1.0
        """What the losses of the schedule are multiplied with."""
        self.failure: Failure | None = None
        self._index = 0
        self._hidden: manual_optimization.HiddenGradients | None = None

    @property
    def path(self) -> frozenset[Any]:
        """What tells the paths of the microbatches from those of other steps of its kind."""
        return frozenset(plan.path for plan in self.plans)

    @property
    def written(self) -> set[str]:
        """Names of the parameters that the step was seen to write to."""
        return {name for plan in self.plans for name in plan.written}

    @contextmanager
    def failing(self, stage: int) -> Iterator[None]:
        """What is raised inside is raised on all ranks at the end of the step; what comes after it, is not."""
        try:
            yield
        except Exception as error:
            self.failure = self.failure or Failure(error, stage)

    def computing(self) -> AbstractContextManager[Any]:
        """While it lasts, a manual step computes only."""
        return manual_optimization.computing(self.module, self._take) if self.is_manual else nullcontext()

    @contextmanager
    def microbatch(self, stage: int, index: int) -> Iterator[None]:
        """Around a microbatch in a stage: it finds the module as it was before the step."""
        is_last = stage == len(self.p2p)
        self._index = index
        self.logs.begin(index, stage == 0, self.plans[index].forwards[stage].sees_metrics)
        self.effects.before_microbatch()
        self._hidden = manual_optimization.HiddenGradients(self.module) if self.is_manual else None
        try:
            with self._hidden or nullcontext():
                yield
        finally:
            self.logs.end()
            if is_last:
                self.effects.after_microbatch()

    def _take(self, loss: Tensor) -> None:
        """The microbatch that runs called ``manual_backward``."""
        if self._index in self.losses:
            raise RuntimeError(manual_optimization.SEVERAL.format(number="several"))
        self.losses[self._index] = loss
        self.logs.takes_unknown = True
        assert self._hidden is not None
        self._hidden.show()

    @property
    def manual_loss(self) -> Tensor | None:
        """The loss of the batch, where the step gave one to ``manual_backward``."""
        if not self.losses:
            return None
        return weighted_mean([self.losses[index].detach() for index in sorted(self.losses)], self.weights)

    def joined(self) -> Any:
        """What the microbatches' steps returned, as one."""
        return joined(self.outputs, self.batch.sizes, self.weights)
