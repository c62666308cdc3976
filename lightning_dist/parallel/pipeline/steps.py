"""A step of a pipeline: the way that it goes through the stages, and a batch that is on it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_dist.parallel.pipeline import batches, by_hand
from lightning_dist.parallel.pipeline.asked import AskedInt, Note, attributes
from lightning_dist.parallel.pipeline.cuts import CutPoint
from lightning_dist.parallel.pipeline.failures import Failure
from lightning_dist.parallel.pipeline.numbers import with_numbers
from lightning_dist.parallel.pipeline.passage import Ghost, Passage
from lightning_dist.parallel.pipeline.setup import refuse_manual
from lightning_dist.parallel.pipeline.staged import origin
from lightning_dist.parallel.pipeline.stages import Cut, points_in
from lightning_dist.parallel.pipeline.trace import Trace, trace_step
from lightning_dist.parallel.pipeline.wire import Wire
from lightning_dist.pytree import deep_leaves
from lightning_dist.random_states import kept_random_states


class Route:
    """A step on microbatches of one shape: where it is cut, and how each stage runs it."""

    def __init__(self, points: list[CutPoint], passages: list[Passage], trace: Trace, flags: tuple[Any, ...]) -> None:
        self.points, self.passages = points, passages
        self.written = trace.written
        self.attributes = set(trace.attributes)
        self.asked = trace.asked
        self.called = {call.name for call in trace.calls}
        self.way = frozenset(self.called), flags, tuple(answer for _, answer in trace.asked)
        """What tells it from other ways of the same kind of step: the modules that it runs, the module's flags, and
        what it was told."""
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


class Routes:
    """The ways that steps go, found by tracing them: one for each kind of step, shape of microbatch, and way to go.

    Args:
        module: cut.
        cut: its stages, and the skeleton that is traced.
        device: of this rank.
    """

    def __init__(self, module: pl.LightningModule, cut: Cut, device: torch.device) -> None:
        self._module, self._skeleton, self._stages, self._device = module, cut.skeleton, cut.stages, device
        self._known: dict[Any, list[Route]] = {}
        self._rest: tuple[Any, ...] = ()
        """The arguments of the step that runs, beside the batch."""

    def of(self, step: str, parts: list[Any], rest: tuple[Any, ...]) -> list[Route]:
        """Of each microbatch.

        Raises:
            ValueError: the step can't be cut as the module is.
        """
        self._rest = rest
        flags = attributes(self._module)
        return [self._one(step, part, flags) for part in parts]

    def _one(self, step: str, part: Any, flags: tuple[Any, ...]) -> Route:
        others = self._rest[1:]  # the loader's index, not the batch's
        key = step, self._module.training, _signature(part), others, flags
        known = self._known.pop(key, [])
        found = next((route for route in known if route.holds), None)
        if found is None:
            found = self._traced(step, part, flags)
            known = [found, *known][:_MANY]
        self._known[key] = known  # the last used at the end
        for outdated in list(self._known)[: len(self._known) - _MANY * _MANY]:
            del self._known[outdated]
        return found

    def _traced(self, step: str, part: Any, flags: tuple[Any, ...]) -> Route:
        self._own_new()
        with kept_random_states(self._device):
            trace = trace_step(self._skeleton, self._module, step, part, self._asked_rest)
        if step == "training_step":
            refuse_manual(self._module, self._skeleton, trace)
        points = [with_numbers(trace, point) for point in points_in(trace, self._stages)]
        ends: list[CutPoint | None] = [None, *points, None]
        return Route(points, [Passage(trace, ends[i], ends[i + 1]) for i in range(len(points) + 1)], trace, flags)

    def _asked_rest(self, note: Note) -> tuple[Any, ...]:
        """The step's other arguments; what is asked of the batch's index is noted."""
        index = [AskedInt(lambda: self._rest[0], note)] if self._rest and type(self._rest[0]) is int else self._rest[:1]
        return (*index, *self._rest[1:])

    def _own_new(self) -> None:
        """Parameters that hooks gave the module: a copy is where the one is that it was made of.

        Raises:
            ValueError: one is new, and is to be trained.
        """
        owners = self._stages.owners
        for name, parameter in self._module.named_parameters():
            if name in owners:
                continue
            original = origin(parameter)
            if original in owners:
                owners[name] = owners[original]
            elif parameter.requires_grad:
                raise ValueError(
                    f"pp: {name} came to the module during the fit, and no stage has it; make it before "
                    "(in __init__, setup or configure_model), where the network is cut"
                )
            else:
                owners[name] = tuple(range(self._stages.num_stages))


_MANY = 8
"""Ways to go of one kind, and the root of the number of kinds, that are kept."""


def _signature(part: Any) -> Any:
    """What a step's path may depend on beside values: shapes and dtypes, and what is no tensor."""
    return tuple(
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf).__name__, _plain(leaf))
        for leaf in deep_leaves(part)
    )


def _plain(leaf: Any) -> Any:
    return leaf if isinstance(leaf, (bool, int, type(None))) else None


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
