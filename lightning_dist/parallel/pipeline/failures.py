"""What a stage of a pipeline meets in a step ends the step on all ranks, in the same words.

[Note: a step that fails on one stage]
The ranks of a pipeline wait for each other's activations. So a rank on which a microbatch raises goes on sending, zeros
from then on, to the end of the schedule; there the ranks tell each other, with the loss, whether anything failed. Then
all raise: the rank that failed first its own exception, with its traceback, and the others one with the same words. No
collective is left open, and nothing was given to an optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from lightning_dist.collectives import gather_objects


@dataclass
class Failure:
    """What a rank met in a step.

    Args:
        error: the first.
        stage: in which it ran; those after it may have failed of the zeros.
    """

    error: Exception
    stage: int


def raise_failure(failure: Failure | None, group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Called on all ranks of a group, of which one has failed at least.

    Communication: one all-gather of short objects over the group.

    Args:
        failure: of this rank.
        group: of the ranks; None for the world.
        device: of this rank.

    Raises:
        Exception: the first failure; see [Note: a step that fails on one stage].
    """
    mine = None if failure is None else (failure.stage, isinstance(failure.error, ValueError), _words(failure.error))
    there = [other for other in gather_objects(mine, group) if other is not None]
    stage, is_value, words = min(there)
    if failure is not None and failure.stage == stage:
        raise failure.error
    if is_value:
        raise ValueError(words)
    raise RuntimeError(words)


def _words(error: Exception) -> str:
    own = isinstance(error, (ValueError, RuntimeError)) and type(error).__module__ == "builtins"
    return str(error) if own else f"{type(error).__name__}: {error}"
