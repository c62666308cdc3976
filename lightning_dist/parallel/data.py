"""One data rank, and what all data axes share: steps, accumulation, buffers that are equal on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase
from torchmetrics import Metric

from lightning_dist.collectives import all_reduce_tensors, broadcast_tensors
from lightning_dist.parallel.buffers import WrittenBuffers, unseen_writes
from lightning_dist.parallel.tensor.axis import TensorAxis

STEPS = ("training_step", "validation_step", "test_step", "predict_step")

CALL = "_call_in_layout"
"""What a strategy of Fabric runs in place of a step: the module's own call, an attribute of it."""


def average_buffers(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Makes the buffers of all data ranks equal: running statistics to their mean, others to the first rank's.

    The running statistics of a BatchNorm are those of each rank's own samples while training. Their mean over the data
    ranks is what evaluation and checkpoints use; DDP would broadcast rank 0's on every forward pass.

    Communication: one all-reduce and one broadcast over the group, of the buffers' bytes; none without buffers.
    """
    metrics = {b for child in module.modules() if isinstance(child, Metric) for b in child.buffers()}
    norms = [child for child in module.modules() if isinstance(child, _NormBase)]
    statistics = [b for norm in norms for b in norm.buffers(recurse=False) if b.is_floating_point()]
    averaged = {*metrics, *statistics}
    others = [b for b in module.buffers() if b not in averaged and not isinstance(b, DTensor)]
    all_reduce_tensors(statistics, group, mean=True)
    with unseen_writes(others):
        broadcast_tensors(others, group)


class Alone:
    """One data rank: nothing is wrapped, and nothing is communicated but by the tensor axis."""

    tensor: TensorAxis | None = None
    """Of the tensor axis, where the layout has one."""
    buffers: WrittenBuffers | None = None
    """Of the data ranks, where there are several."""

    def __init__(self, module: nn.Module) -> None:
        self.module: nn.Module = module
        self.reduces = True

    def before_training_step(self) -> None:
        """Called before each training step. Communication: see :class:`WrittenBuffers`."""
        if self.buffers is not None:
            self.buffers.before_step()

    def run(self, step: str, *args: Any, **kwargs: Any) -> Any:
        """Runs a step of the LightningModule, or what Fabric calls."""
        output = getattr(self.module, step)(*args, **kwargs)
        if self.tensor is not None:
            self.tensor.after_step()
        return output

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs a function that runs a step of the module, as :meth:`run` runs the step itself."""
        output = function(*args)
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

    def before_backward(self, loss: Tensor) -> Tensor:
        """The loss to start a backward pass from; called before each."""
        return loss

    def after_backward(self) -> None:
        """Called after each backward pass."""
        if self.tensor is not None and self.reduces:
            self.tensor.after_backward()

    def skip_backward(self, held: bool) -> None:
        """Called where all ranks skip a backward pass.

        Args:
            held: gradients of earlier passes may be there that were not reduced yet.
        """

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

    def share_buffers(self) -> None:
        """Makes buffers equal on all stages of a pipeline; called after :func:`average_buffers`."""
