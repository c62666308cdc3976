"""What came of a step over microbatches and of the same over the whole batch, compared."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dist.compat.torch import BatchNormBase, NormBase
from lightning_dist.logs.metrics import metrics_in
from lightning_dist.parallel.pipeline.plain_values import number_kind
from lightning_dist.parallel.pipeline.step_effects import Effects
from lightning_dist.parallel.rehearsal import FixedNumbers
from lightning_dist.placeholder import is_placeholder

ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Relative difference that is taken for rounding; where something is computed in 16 bits, ``COARSE_ROUNDING``."""

COARSE_ROUNDING = 0.05


@dataclass
class Outcome:
    """What came of a step that was tried.

    Args:
        output: that it returned; None on ranks that have not the last stage.
        loss: that it gave to ``manual_backward``.
        logged: by name.
        effects: what it leaves in attributes of the LightningModule and its parts.
        left: buffers, and the numbers and lengths of lists of its parts, by what to call them.
        written: parameters of this rank that it writes to.
    """

    output: Any = None
    loss: Tensor | None = None
    logged: dict[str, Any] = field(default_factory=dict)
    effects: Effects = field(default_factory=Effects)
    left: dict[str, Any] = field(default_factory=dict)
    written: dict[str, Tensor] = field(default_factory=dict)


def compare(step: str, whole: Outcome, parts: Outcome, num_parts: int) -> str:
    """What differs, in a sentence; empty if nothing does.

    Args:
        step: its name.
        whole: of the whole batch.
        parts: the same of the microbatches, put together.
        num_parts: how many those are.
    """
    found = _difference("what it returns", whole.output, parts.output)
    found = found or _difference("the loss", whole.loss, parts.loss)
    for name, value in whole.logged.items():
        found = found or _difference(f"the logged {name!r}", value, parts.logged.get(name))
    for (name, key), value in whole.effects.attributes.items():
        what = f"the attribute {name!r}" if key is None else f"the attribute {name!r}, {key!r},"
        found = found or _difference(what, value, parts.effects.attributes.get((name, key)))
    for (name, key), value in whole.effects.numbers.items():
        found = found or _difference(
            f"the attribute {key!r} of {name!r}", value, parts.effects.numbers.get((name, key))
        )
    for what, value in whole.left.items():
        found = found or _difference(what, value, parts.left.get(what))
    for name, value in whole.written.items():
        found = found or _difference(f"the parameter {name}, to which it writes,", value, parts.written.get(name))
    if not found:
        return ""
    return (
        f"pp: {step} over {num_parts} microbatches gives other numbers than over the whole batch at once: {found}. "
        "It is no mean over samples, or its batch is not split along its samples. Say with batch_split= how a batch is "
        "split, or with microbatch_weight= what a microbatch counts; or use num_microbatches=1, or another axis. "
        "pipeline_check=False trains on the mean of microbatches all the same"
    )


def left_in_parts(module: nn.Module) -> dict[str, Any]:
    """What a step leaves in the parts of a module: buffers, numbers and lists. What metrics have is counted by them."""
    found: dict[str, Any] = {
        f"the buffer {name}": buffer.detach().clone()
        for name, buffer in module.named_buffers()
        if not is_placeholder(buffer)
    }
    inside = {id(child) for metric in metrics_in(module) for child in metric.modules()}
    for name, child in module.named_modules():
        if name and id(child) not in inside:
            for key, value in vars(child).items():
                if not key.startswith("_") and (number_kind(value) or type(value) is list):
                    what = f"the attribute {key!r} of {name!r}"
                    found[what] = len(value) if type(value) is list else value
    return found


def batch_norm(module: nn.Module, called: set[str]) -> str:
    """The sentence where a step runs a BatchNorm that normalises what it is given; empty where none does."""
    for name, child in module.named_modules():
        if name in called and isinstance(child, NormBase) and child.training and _looks_at_batch(child):
            return (
                f"pp: {name} ({type(child).__name__}) takes statistics of each microbatch, where one process takes "
                "those of the whole batch; use num_microbatches=1, a norm of each sample (GroupNorm, LayerNorm), "
                "eval() on it, or another axis. pipeline_check=False trains on the statistics of microbatches"
            )
    return ""


def _looks_at_batch(norm: Any) -> bool:
    return isinstance(norm, BatchNormBase) or norm.track_running_stats


def _difference(what: str, whole: Any, parts: Any) -> str:
    if isinstance(whole, Tensor) and isinstance(parts, Tensor):
        if is_placeholder(whole) or is_placeholder(parts):
            return ""
        if whole.shape != parts.shape:
            return f"{what} is of shape {list(parts.shape)} / {list(whole.shape)}"
        return "" if _is_close(parts, whole) else f"{what} is {_shown(parts, whole)} / {_shown(whole, parts)}"
    if isinstance(whole, (bool, int, float, Tensor)) and isinstance(parts, (bool, int, float, Tensor)):
        return _difference(what, torch.as_tensor(whole), torch.as_tensor(parts).to(torch.as_tensor(whole).dtype))
    if isinstance(whole, dict) and isinstance(parts, dict):
        pairs = [(f"{what}, {key!r},", value, parts.get(key)) for key, value in whole.items()]
    elif isinstance(whole, (list, tuple)) and isinstance(parts, (list, tuple)):
        if len(whole) != len(parts):
            return f"{what} has {len(parts)} / {len(whole)} items"
        pairs = [(f"{what}, [{i}],", *both) for i, both in enumerate(zip(whole, parts, strict=True))]
    else:
        return "" if type(whole) is type(parts) else f"{what} is a {type(parts).__name__} / {type(whole).__name__}"
    return next((found for pair in pairs if (found := _difference(*pair))), "")


def _is_close(parts: Tensor, whole: Tensor) -> bool:
    if not whole.is_floating_point():
        return bool(torch.isclose(parts.double(), whole.double(), rtol=1e-6).all())
    rounding = ROUNDING.get(whole.dtype, COARSE_ROUNDING)
    if torch.is_autocast_enabled(whole.device.type) or torch.get_float32_matmul_precision() != "highest":
        rounding = COARSE_ROUNDING
    one, other = parts.detach().double().flatten(), whole.detach().double().flatten()
    if not bool((one.isnan() == other.isnan()).all()):
        return False
    one, other = one.nan_to_num(), other.nan_to_num()
    return float((one - other).norm()) <= rounding * max(float(other.norm()), 1e-3 * math.sqrt(max(1, one.numel())))


def _shown(value: Tensor, other: Tensor) -> str:
    if value.numel() == 1:
        return f"{float(value):.8g}"
    place = int((value.double() - other.double()).abs().nan_to_num(torch.inf).argmax())
    return f"{float(value.flatten()[place]):.8g} in place {place}"


@contextmanager
def fixed_numbers() -> Iterator[None]:
    """While it lasts, random operations give fixed numbers, and nothing is compiled."""
    with torch.compiler.set_stance("force_eager"), FixedNumbers():
        yield
