"""What a step over microbatches returned, and what it leaves in its module, on every rank of the pipeline."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dist.parallel.pipeline.failures import raise_failure
from lightning_dist.parallel.pipeline.microbatch_check import MicrobatchCheck
from lightning_dist.parallel.pipeline.stages import Stages
from lightning_dist.parallel.pipeline.step_effects import Effects, marked, pack, share
from lightning_dist.parallel.pipeline.step_state import StepInFlight
from lightning_dist.parallel.pipeline.trace import loss_of
from lightning_dist.placeholder import is_placeholder
from lightning_dist.pytree import deep_leaves


def share_result(
    step: StepInFlight,
    trains: bool,
    shares: bool,
    check: MicrobatchCheck,
    has_last: bool,
    stages: Stages,
    group: dist.ProcessGroup,
    device: torch.device,
) -> tuple[Tensor, Any]:
    """The loss of a step that has run, and what it returned beside; leaves what the step kept in the module.

    Communication over the axis: one all-reduce of 32 bytes with the loss, a size, and the numbers of ranks that failed,
    and that took another path than before; and one broadcast of what else there is to share, see [Note: what the last
    stage made].

    Args:
        step: over all microbatches.
        trains: whether it has a loss.
        shares: whether what it returned and kept goes to all ranks.
        check: compares a step of a new path.
        has_last: whether this rank has the last stage.
        stages: of the module.
        group: the ranks of the axis.
        device: of this rank.

    Raises:
        Exception: what a stage met; see [Note: a step that fails on one stage].
    """
    loss, output, effects, payload = torch.zeros((), device=device), None, Effects(), b""
    with step.failing(stages.num_stages):
        if has_last:
            loss, output = _result(step, trains, loss)
            effects = step.effects.joined(step.batch.sizes, step.weights)
            effects.attributes = marked(effects.attributes)
            payload = pack([output, *effects.to_items()]) if shares else b""
        if not step.is_manual:
            step.logs.replay()
    # ranks may not know in which dtype the last stage computes it
    flags = [float(len(payload)), float(step.failure is not None), float(check.is_new(step))]
    header = torch.cat([loss.reshape(1).double(), torch.tensor(flags, dtype=torch.float64, device=device)])
    dist.all_reduce(header, group=group)
    if header[3] and not header[2]:
        check.after_step(step)
    if header[2]:
        raise_failure(step.failure, group, device)
    if size := int(header[1]):
        output, *items = share(payload, size, group, stages.last_rank, device)
        effects = Effects.of_items(items)
    step.effects.leave(effects)
    value = header[0].to(loss.dtype if has_last else torch.get_default_dtype())
    return (value.float() if value.dtype.itemsize < 4 else value), output


def _result(step: StepInFlight, trains: bool, no_loss: Tensor) -> tuple[Tensor, Any]:
    """The loss of the last stage, and what the step returned beside it."""
    output = step.joined()
    if step.manual_loss is not None:
        return step.manual_loss.reshape(()).to(no_loss.device), output
    if not trains:
        return no_loss, output
    named = output if isinstance(output, dict) else {}
    beside = {key: value for key, value in named.items() if key != "loss" and not _holds_placeholder(value)}
    return loss_of(output).detach().reshape(()).to(no_loss.device), beside or None


def _holds_placeholder(value: Any) -> bool:
    return any(is_placeholder(leaf) for leaf in deep_leaves(value))
