"""A batch on its way through the pipeline.

[Note: a step that fails on one stage]
The ranks of a pipeline wait for each other's activations. So a rank on which a microbatch raises goes on sending, zeros
from then on, to the end of the schedule; there the ranks tell each other, with the loss, whether anything failed. Then
all raise: the rank that failed first its own exception, with its traceback, and the others one with the same words. No
collective is left open, and nothing was given to an optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dist.collectives import gather_objects
from lightning_dist.logs.microbatches import RecordedLogs
from lightning_dist.parallel.pipeline import manual_optimization
from lightning_dist.parallel.pipeline.p2p import P2PTensors
from lightning_dist.parallel.pipeline.stage_plans import StagePlan
from lightning_dist.parallel.pipeline.step_effects import StepEffects, joined, weighted_mean
from lightning_dist.parallel.pipeline.trace import loss_of
from lightning_dist.placeholder import is_placeholder
from lightning_dist.pytree import deep_leaves


@dataclass
class Failure:
    """The first error that a rank met in a step, in which stage; those after it may have failed of the zeros."""

    error: Exception
    stage: int


def raise_failure(failure: Failure | None, group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Raises the first failure of a group's ranks (None: of the world), on all; called where one has failed at least.

    Communication: one all-gather of short objects over the group. See [Note: a step that fails on one stage].
    """
    mine = None
    if failure is not None:
        error, is_value = failure.error, isinstance(failure.error, ValueError)
        own = isinstance(error, (ValueError, RuntimeError)) and type(error).__module__ == "builtins"
        mine = failure.stage, is_value, str(error) if own else f"{type(error).__name__}: {error}"
    stage, is_value, words = min(other for other in gather_objects(mine, group) if other is not None)
    if failure is not None and failure.stage == stage:
        raise failure.error
    raise (ValueError if is_value else RuntimeError)(words)


@dataclass(frozen=True)
class SplitBatch:
    """A batch in microbatches, and how many samples each has; ``others`` are the step's other arguments, the batch's
    index first where it takes one. It runs ``in_order`` where it is too small for the schedule.
    """

    whole: Any
    others: tuple[Any, ...]
    parts: list[Any]
    sizes: list[int]
    in_order: bool

    def unsplit(self) -> SplitBatch:
        return SplitBatch(self.whole, self.others, [self.whole], [sum(self.sizes)], True)


@dataclass(eq=False)
class StepInFlight:
    """A step over the microbatches of a batch, from its begin until all ranks have what it returned.

    Args:
        weights: what each microbatch counts in means.
        logs: takes what microbatches log.
        alike: all microbatches begin with the same random numbers.
    """

    module: pl.LightningModule
    name: str
    batch: SplitBatch
    weights: list[float]
    plans: list[StagePlan]
    logs: RecordedLogs
    alike: bool = False

    def __post_init__(self) -> None:
        module, plans = self.module, self.plans
        self.kind = self.name, module.training, self.batch.others[1:]
        """What steps have in common that are compared once: the name, the mode, and the loader's index."""
        self.is_manual = self.name == "training_step" and not module.automatic_optimization
        self.p2p = [P2PTensors.of([plan.points[at] for plan in plans]) for at in range(len(plans[0].points))]
        """What travels between each two stages."""
        self.effects = StepEffects(module, {place for plan in plans for place in plan.attributes})
        self.outputs: list[Any] = [None] * len(self.batch.parts)
        self.losses: dict[int, Tensor] = {}
        """What microbatches gave to ``manual_backward``."""
        self.seed = 0
        self.loss_scale: Tensor | float = 1.0
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

    def users(self, name: str) -> set[int]:
        """Stages that use a parameter."""
        return {stage for plan in set(self.plans) for stage in plan.users.get(name, ())}

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
        self._index = index
        self.logs.begin(index, stage == 0, self.plans[index].forwards[stage].sees_metrics)
        self.effects.before_microbatch()
        self._hidden = manual_optimization.HiddenGradients(self.module) if self.is_manual else None
        try:
            with self._hidden or nullcontext():
                yield
        finally:
            self.logs.end()
            if stage == len(self.p2p):
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
        losses = [loss.detach() for _, loss in sorted(self.losses.items())]
        return weighted_mean(losses, self.weights) if losses else None

    def joined(self) -> Any:
        return joined(self.outputs, self.batch.sizes, self.weights)

    def result(self, trains: bool, no_loss: Tensor) -> tuple[Tensor, Any]:
        """The loss of the last stage, and what the step returned beside it."""
        output = self.joined()
        if self.manual_loss is not None:
            return self.manual_loss.reshape(()).to(no_loss.device), output
        if not trains:
            return no_loss, output
        named = output if isinstance(output, dict) else {}
        beside = {k: v for k, v in named.items() if k != "loss" and not any(map(is_placeholder, deep_leaves(v)))}
        return loss_of(output).detach().reshape(()).to(no_loss.device), beside or None
