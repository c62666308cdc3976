"""Running a step over placeholders to see what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_dist.compat.torch import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
    without_fake_tensor_errors,
)
from lightning_dist.parallel.pipeline.fake_module import FakeModule
from lightning_dist.parallel.pipeline.guards import AddGuard
from lightning_dist.parallel.pipeline.manual_optimization import SEVERAL
from lightning_dist.parallel.pipeline.trace import Trace, loss_of
from lightning_dist.parallel.pipeline.trace_recorder import TraceRecorder
from lightning_dist.placeholder import is_placeholder
from lightning_dist.pytree import deep_tensors

_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


def trace_step(
    fake_module: FakeModule,
    module: pl.LightningModule,
    name: str,
    part: Any,
    rest: tuple[Any, ...] | Callable[[AddGuard], tuple[Any, ...]] = (),
) -> Trace:
    """Runs a step of the fake module once, without computing what depends on a parameter.

    Args:
        fake_module: of the module.
        module: whose state the step may ask for.
        name: of the step.
        part: a microbatch.
        rest: the step's other arguments; or what makes them, from what is told of the questions that are asked of them.

    Returns:
        What ran.
    """
    recorder = TraceRecorder(fake_module)
    fake_module.follow(module, recorder.add_guard, in_step=True)
    try:
        with torch.no_grad(), without_fake_tensor_errors(), recorder.seeing_attributes(), recorder:
            others = rest(recorder.add_guard) if callable(rest) else rest
            recorder.trace.output = getattr(fake_module.module, name)(part, *others)
    except (*_NEEDS_VALUES, RuntimeError) as error:
        recorder.trace.open_end = _value_asked_for(error, name)
    finally:
        recorder.put_back()
        recorder.trace.kept = _kept(fake_module.module)
        fake_module.forget_trainer()
    _mark_loss_used(recorder.trace)
    return recorder.trace


def _value_asked_for(error: Exception, step: str) -> str:
    """What a step asked of a value, where its trace ends by this error; raises any other error."""
    if isinstance(error, _NEEDS_VALUES):
        return str(error) or type(error).__name__
    if "does not require grad" in str(error):
        raise ValueError(
            f"pp: {step} takes gradients itself (torch.autograd.grad, or backward), through a network of which a rank "
            "has some stages only; use another axis"
        ) from error
    if "numpy() is not supported for tensor subclasses" not in str(error):
        raise error
    return str(error)


def _kept(module: nn.Module) -> list[tuple[str, str, Any, Tensor]]:
    """Tensors without memory in attributes of modules; see :class:`Trace`."""
    found: list[tuple[str, str, Any, Tensor]] = []
    for name, child in module.named_modules():
        for key, value in vars(child).items():
            if key.startswith("_"):
                continue
            if is_placeholder(value):
                found.append((name, key, None, value))
            elif type(value) is dict:
                found += [(name, key, inner, item) for inner, item in value.items() if is_placeholder(item)]
    return found


def _mark_loss_used(trace: Trace) -> None:
    """What is returned as the loss is used at the end."""
    for tensor in deep_tensors(loss_of(trace.output)):
        if id(tensor) in trace.values:
            trace.values[id(tensor)].used = trace.num_ops


def refuse_manual(module: pl.LightningModule, fake_module: FakeModule, trace: Trace) -> None:
    """Raises where a step that optimises by hand can't be run over microbatches.

    Args:
        module: whose step it is.
        fake_module: that ran it last.
        trace: of that.

    Raises:
        ValueError: there is not one loss, or the step asks for its value.
    """
    if module.automatic_optimization:
        return
    if trace.open_end:
        raise ValueError(
            f"pp: a training_step that optimises manually, and asks for the value of a tensor ({trace.open_end}), "
            "which is on the last stage only; leave .item() out (self.log takes tensors), or use another axis"
        )
    if fake_module.backwards != 1:
        raise ValueError(SEVERAL.format(number=fake_module.backwards))
