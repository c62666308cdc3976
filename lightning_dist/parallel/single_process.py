"""One data rank; the other runners of a step go beyond it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from lightning_dist.parallel.buffers import WrittenBuffers
from lightning_dist.parallel.tensor.split import TensorAxis

STEPS = ("training_step", "validation_step", "test_step", "predict_step")

CALL = "lightning_dist_call"
"""What a strategy of Fabric runs in place of a step: the module's own call, an attribute of it."""


class SingleProcessRunner:
    """Runs the steps of a module that one data rank holds: nothing is wrapped, only the tensor axis communicates.

    Args:
        module: as the layout left it.
        tensor: the tensor axis, where the layout has one.
    """

    buffers: WrittenBuffers | None = None
    """Those that training writes, where there are several data ranks."""
    weight = 1.0
    """What the loss of the batch that runs is multiplied with before its backward."""

    def __init__(self, module: nn.Module, tensor: TensorAxis | None = None) -> None:
        self.module, self.tensor = module, tensor
        self.reduces = True

    def before_training_step(self) -> None:
        """Called before each training step. Communication: see :class:`WrittenBuffers`."""
        if self.buffers is not None:
            self.buffers.before_step()

    def run(self, step: str, *args: Any, **kwargs: Any) -> Any:
        """Runs a step of the LightningModule, or what Fabric calls."""
        return self.call(getattr(self.module, step), *args, **kwargs)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the user's step, or what stands for it: a stage of it."""
        output = function(*args, **kwargs)
        if self.tensor is not None:
            self.tensor.after_step()
        return output

    def users_step(self, name: str) -> Callable[..., Any]:
        """A step as the user wrote it, without what a layout does around it."""
        return getattr(self.module, name)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """While it lasts, backward passes add to the gradients without reducing them."""
        self.reduces = False
        try:
            yield
        finally:
            self.reduces = True

    def weighted(self, loss: Tensor) -> Tensor:
        """The loss of the step that runs, as much as it counts beside others."""
        return loss if self.weight == 1 else loss * self.weight

    def before_backward(self, loss: Tensor) -> Tensor:
        """The loss to start a backward pass from; called before each."""
        return loss

    def after_backward(self) -> None:
        """Called after each backward pass."""
        if self.tensor is not None and self.reduces:
            self.tensor.after_backward()

    def skip_backward(self, held: bool) -> None:
        """Called where all ranks skip a backward pass; ``held``: earlier ones may have left gradients to reduce."""

    def show(self) -> None:
        """Called when parameters are in place: the user's code may see them. Communication: none."""

    def stepping(self, optimizer: Any) -> AbstractContextManager[None]:
        """While an optimizer steps."""
        return nullcontext()

    def hooked(self) -> AbstractContextManager[None]:
        """Inside of :meth:`stepping`, while hooks run that look at gradients."""
        return nullcontext()

    def before_step_hooks(self) -> None:
        """Called before hooks that look at finished gradients, which are unscaled by then."""

    def hide_gradients(self) -> None:
        """Called when those hooks have run."""

    def reshard(self) -> None:
        """Frees what was gathered for a forward pass that no backward followed. Communication: none."""

    def forget_step(self) -> None:
        """Drops what is left of a step that an exception ended on all ranks alike. Communication: none."""

    def validate_steps(self) -> None:
        """Raises what this rank has not looked at yet of the steps so far, on all ranks alike. Communication: none."""

    def buffers_of_others(self) -> set[str]:
        """Names of buffers that other stages of a pipeline change, which are not up to date here."""
        return set()

    def share_buffers(self) -> None:
        """Makes buffers equal on all stages of a pipeline; called after :func:`average_buffers`."""
