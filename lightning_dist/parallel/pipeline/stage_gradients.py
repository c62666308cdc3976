"""Gradients that a schedule computed: put where autograd would have put them, and reduced over stages and data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dist.compat.torch import DisableTorchFunctionSubclass
from lightning_dist.dtensors import local_part
from lightning_dist.parallel.pipeline.gradient_averaging import GradientAveraging
from lightning_dist.parallel.pipeline.stages import Pipeline
from lightning_dist.parallel.pipeline.tied_gradients import TiedGradients
from lightning_dist.placeholder import held, is_placeholder


class StageGradients:
    """The gradients of the parameters that a rank of a pipeline holds.

    [Note: gradients of a schedule]
    A schedule computes gradients while Lightning runs ``training_step``; Lightning then zeroes them, and asks for the
    backward of a loss. So they are set aside, and the loss that is returned puts them in place in its backward, scaled
    by what Lightning scaled it with. A sharded parameter's gradient stays where fully_shard gathers it until then.

    Args:
        module: cut.
        pipeline: of this rank.
        pipelines: the ranks of every pipeline of the world, by stage; all of them make one at the same time.
        averaging: over the data ranks; None where gradients are averaged elsewhere, or there is one data rank.
    """

    def __init__(
        self, module: nn.Module, pipeline: Pipeline, pipelines: list[list[int]], averaging: GradientAveraging | None
    ) -> None:
        self._module, self._pipeline, self._averaging = module, pipeline, averaging
        self._tied = TiedGradients(module, pipeline, pipelines)
        self._aside: list[tuple[nn.Parameter, Tensor]] = []
        self._trained: set[str] = set()
        """Names of what required a gradient in some backward pass since gradients were reduced."""
        self._beside: GradientAveraging | None = None
        """Where the schedule that runs completes gradients, and they are averaged beside it."""

    @contextmanager
    def aside(
        self,
        parameters: list[nn.Parameter],
        zeroed: set[nn.Parameter] | None,
        completed_in: Callable[[str], set[int]] | None = None,
    ) -> Iterator[None]:
        """While it lasts, a schedule computes gradients of parameters, which are kept for :meth:`hand_over`.

        Args:
            parameters: whose gradients autograd itself puts in place.
            zeroed: what Lightning, which alone runs from here to the backward, zeroes: those gradients are dropped now,
                and the schedule adds to the others. None: it makes gradients of its own, beside those that are there.
            completed_in: the stages that use a parameter, by its name, where that backward reduces.
        """
        before = [p.grad if zeroed is None else None for p in parameters]
        for parameter in parameters:
            if zeroed is None or parameter in zeroed:
                parameter.grad = None
        self._note_trained()
        if zeroed is not None:
            self._tied.divide()
        self._beside = None
        if zeroed is not None and completed_in is not None and self._averaging is not None:
            self._beside = self._averaging
            self._beside.begin(self._completed_by_stage(completed_in))
        yield
        self._beside = None
        self._aside = [(p, p.grad) for p in parameters if p.grad is not None]
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient

    def last_backward(self, stage: int) -> AbstractContextManager[None]:
        """Around the backward of a stage's last microbatch."""
        return nullcontext() if self._beside is None else self._beside.last_backward(stage)

    def _note_trained(self) -> None:
        with DisableTorchFunctionSubclass():  # tensors in a user's hands take long to answer
            self._trained.update(name for name, p in self._module.named_parameters() if p.requires_grad)

    def _completed_by_stage(self, users: Callable[[str], set[int]]) -> dict[int, list[nn.Parameter]]:
        """What is trained in one stage alone, by stage; what several use, tied over a cut, is complete later."""
        found: dict[int, list[nn.Parameter]] = {}
        for name, parameter in self._module.named_parameters():
            if name in self._trained and not is_placeholder(parameter):
                stages = users(name).union(self._pipeline.stages.owners.get(name, ()))
                if len(stages) == 1:
                    found.setdefault(stages.pop(), []).append(parameter)
        return found

    @torch.no_grad()
    def hand_over(self, ratio: Tensor | None) -> None:
        """Adds what is aside to the parameters' gradients; times a number, if it is given."""
        self._tied.divide()
        self._note_trained()
        for parameter, gradient in self._aside:
            if ratio is not None:
                local_part(gradient).mul_(ratio)
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)
        self._aside = []

    @torch.no_grad()
    def reduce(self) -> None:
        """Sums what is tied over a cut, and averages over the data ranks, if that is to be done here."""
        self._tied.sum(self._trained)
        if self._averaging is not None:
            trained = held(p for name, p in self._module.named_parameters() if name in self._trained)
            self._averaging.finish(trained)
        self._trained = set()

    def forget(self) -> None:
        """Drops what is left of a step that an exception ended on all ranks alike."""
        self._aside = []
        if self._averaging is not None:
            self._averaging.forget()


class HandOver(torch.autograd.Function):
    """The loss of a finished schedule, whose backward hands over; see [Note: gradients of a schedule]."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, hand_over: Callable[[Tensor], None], loss: Tensor) -> Tensor:
        ctx.hand_over = hand_over
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        ctx.hand_over(scale)
        return torch.zeros_like(scale), None, None
