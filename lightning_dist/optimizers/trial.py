"""Whether an optimizer, stepping over divided parameters, does what it does over whole ones: it is tried.

[Note: the trial of an optimizer]
Two copies of the optimizer take a few steps by the same gradients over small tensors: one over whole tensors, one over
tensors divided as the parameters are. What works element by element, or knows how to look at divided tensors, ends
with the same values. What takes the norm of a part for that of the whole, or looks at all parameters where a rank has
some of them (stages), does not. Gradients grow from step to step, so that what clips large ones does; they depend on
the parameters, for what asks again within a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Optimizer

from lightning_dist.dtensors import as_dtensor, local_part
from lightning_dist.optimizers.local_step import step_over_local_parts
from lightning_dist.optimizers.twin import Small, Twin, all_parameters, as_divided, representatives, this_ranks_part
from lightning_dist.patches import Patches
from lightning_dist.placeholder import is_placeholder

SCALES = (1e-2, 1.0, 10.0, 100.0, 100.0, 100.0)
"""Sizes of the gradients, step by step; six, since Lookahead looks every five or six."""

TOLERANCE, ROUNDING = 1e-3, 1e-6
"""How far a step may be from the whole one: of the way that this went, and of the size of what it changed."""

EXACT, DIFFERENT, FAILED, UNKNOWN = range(4)


@dataclass
class Verdict:
    """What a trial found: ``EXACT``, ``DIFFERENT``, ``FAILED`` over divided tensors, ``UNKNOWN`` (over whole ones)."""

    found: int = EXACT
    difference: float = 0.0
    error: Exception | None = None


def validate_exact(optimizer: Optimizer, layout: Any, device: torch.device) -> None:
    """Raises, on all ranks alike, for an optimizer that steps otherwise over divided parameters than over whole ones.

    The optimizer, its parameters and the random state stay as they are. See [Note: the trial of an optimizer].

    Args:
        optimizer: over the module's parameters: plain, DTensors, or placeholders of other stages.
        layout: for messages.
        device: of this rank.

    Raises:
        ValueError: what it does otherwise, and what would do.

    Communication: one all-reduce of two numbers over the world, and what the optimizer itself does over the meshes of
    its parameters.
    """
    name = _name(optimizer)
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        raise ValueError(
            f"{name} deals whole parameters to the ranks, and layout {layout} has divided them already; use the "
            "optimizer inside it alone, whose states dp_shard divides, or dp_replicate"
        )
    parameters = all_parameters(optimizer.param_groups)
    is_divided = any(isinstance(parameter, DTensor) or is_placeholder(parameter) for parameter in parameters)
    verdict = _try(optimizer) if is_divided else Verdict()
    found, difference = _agreed(verdict, device)
    if found != EXACT:
        raise ValueError(
            f"{name} {_reason(found, difference, verdict.error, layout)}; use dp_replicate, or an optimizer that works "
            "element by element, such as AdamW"
        ) from verdict.error


def _reason(found: int, difference: float, error: Exception | None, layout: Any) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0][:200]
    told = "" if error is None else f" ({type(error).__name__}: {first_line})"
    if found == DIFFERENT:
        return (
            f"steps otherwise over parameters that layout {layout} divides than over whole ones, as it looks at more "
            f"than single elements: tried on small tensors, it is off by {difference:.1%} of the step"
        )
    if found == FAILED:
        return f"can't step over parameters that layout {layout} divides: tried on small tensors, it fails{told}"
    return (
        f"could not be tried on small tensors{told}, so nothing tells whether it may step over parameters that layout "
        f"{layout} divides"
    )


def _try(optimizer: Optimizer) -> Verdict:
    """On a few parameters of each kind; on all if that is too few for it to step at all."""
    verdict = Verdict()
    parameters = all_parameters(optimizer.param_groups)
    versions = [_version(p) for p in parameters]
    for chosen in (representatives(optimizer), parameters):
        smalls = [Small(p, number) for number, p in enumerate(chosen) if p.is_floating_point() or p.is_complex()]
        with isolate_rng():
            verdict = _compare(optimizer, smalls)
        if [_version(p) for p in parameters] != versions:
            return Verdict(UNKNOWN, error=RuntimeError("it keeps its parameters where a copy does not find them"))
        if verdict.found != UNKNOWN:
            break
    return verdict


def _compare(optimizer: Optimizer, smalls: list[Small]) -> Verdict:
    starts: dict[int, Tensor] = {}
    losses: list[Tensor] = []
    try:
        twin = Twin(optimizer, smalls, Small.whole, lambda _, whole: whole.clone(), starts)
        whole = _steps(twin, smalls, losses, whole=True)
        _refuse_nothing_seen(smalls, whole)
    except Exception as error:
        return Verdict(UNKNOWN, error=error)
    try:
        twin = Twin(optimizer, smalls, Small.divided, _divided_state, starts)
        step_over_local_parts(twin.optimizer, Patches())
        apart = _steps(twin, smalls, losses, whole=False)
    except Exception as error:
        return Verdict(FAILED, error=error)
    difference = max(map(_difference, smalls, whole, apart), default=0.0)
    return Verdict(DIFFERENT if difference > TOLERANCE else EXACT, difference)


def _refuse_nothing_seen(smalls: list[Small], whole: list[list[Tensor]]) -> None:
    if not all(bool(after[0].isfinite().all()) for after in whole):
        raise ArithmeticError("its first step ends in values that are not finite")
    trained = [(small, after) for small, after in zip(smalls, whole, strict=True) if small.parameter.requires_grad]
    if trained and all(torch.equal(small.value, after[-1]) for small, after in trained):
        raise ArithmeticError(f"it changes nothing in {len(SCALES)} steps")


def _divided_state(small: Small, whole: Tensor) -> Tensor:
    return whole if is_placeholder(small.parameter) else as_divided(whole, small.parameter).detach()


def _steps(twin: Twin, smalls: list[Small], losses: list[Tensor], whole: bool) -> list[list[Tensor]]:
    """What this rank holds of each small tensor after each step.

    Args:
        losses: what closures return; noted by the steps over whole tensors, repeated by those over divided ones, which
            see the same as long as they go the same way.
    """
    parameters = [twin.parameters[id(small.parameter)] for small in smalls]
    after: list[list[Tensor]] = [[] for _ in smalls]
    if not whole:
        losses = losses[::-1]
    torch.manual_seed(0)
    for scale in SCALES:

        def closure(scale: float = scale) -> Tensor:
            loss = _set_gradients(parameters, smalls, scale, whole)
            if whole:
                losses.append(loss)
                return loss
            return losses.pop() if losses else loss

        _set_gradients(parameters, smalls, scale, whole)
        step: Any = twin.optimizer.step
        with torch.enable_grad():
            step(closure=closure)  # as Lightning calls it
        for values, parameter in zip(after, parameters, strict=True):
            values.append(parameter.detach() if is_placeholder(parameter) else local_part(parameter).clone())
    return after


@torch.no_grad()
def _set_gradients(parameters: list[Tensor], smalls: list[Small], scale: float, whole: bool) -> Tensor:
    """Gradients of ``scale * (p^2 / 8 + slope * p)``, summed; returns that sum over what this rank holds."""
    loss = torch.zeros((), device=smalls[0].device)
    for parameter, small in zip(parameters, smalls, strict=True):
        if not small.parameter.requires_grad or is_placeholder(parameter):
            continue
        slope = small.slope if whole else this_ranks_part(small.slope, small.parameter)
        held = local_part(parameter)
        gradient: Any = scale * (held / 4 + slope)
        loss = loss + scale * (held**2 / 8 + slope * held).sum().real.to(loss)
        if isinstance(parameter, DTensor):
            gradient = as_dtensor(gradient, parameter)
            gradient.__class__ = type(parameter)
        parameter.grad = gradient
    return loss


def _difference(small: Small, whole: list[Tensor], apart: list[Tensor]) -> float:
    """The largest distance after a step, relative to how far the whole tensor went until then."""
    if is_placeholder(small.parameter):
        return 0.0
    largest = 0.0
    for one, part in zip(whole, apart, strict=True):
        if not bool(one.isfinite().all()):
            break  # a step too long for what is tried here
        distance = (part - this_ranks_part(one, small.parameter)).norm().nan_to_num(torch.inf)
        went = (one - small.value).norm()
        excess = float(distance) - ROUNDING * float(one.norm())
        if excess > 0:
            largest = max(largest, excess / max(float(went), 1e-30))
    return largest


def _agreed(verdict: Verdict, device: torch.device) -> tuple[int, float]:
    """The worst verdict of all ranks, and the largest difference."""
    found = torch.tensor([float(verdict.found), min(verdict.difference, 1e6)], device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found[0]), float(found[1])


def _version(parameter: Tensor) -> int:
    return -1 if is_placeholder(parameter) else parameter._version


def _name(optimizer: Optimizer) -> str:
    kind = type(optimizer)
    return f"torch's {kind.__name__}" if kind.__module__.startswith("torch.") else kind.__name__


def reads_the_loss(optimizer: Optimizer) -> bool:
    """Whether a step depends on the loss that its closure returns, so that ranks have to return the same one."""
    return isinstance(optimizer, LBFGS)
