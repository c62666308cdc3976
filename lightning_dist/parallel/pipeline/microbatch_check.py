"""A step over microbatches is what it is over the whole batch: seen once, before anything is trained on it.

[Note: microbatches are compared]
A batch is split along what its tensors seem to have their samples in, the step runs on each part, and the parts' losses
are averaged. Steps whose result is no mean over samples (a contrastive loss, a sum, a mean over the tokens that have a
label, a batch that is flipped) would give other numbers, and no error would tell. So the first time that a kind of step
runs in microbatches, and where its path changes, it runs twice more without gradients, over the microbatches and over
the whole batch at once, and what it returned, logged and kept is compared. While it is, random operations give fixed
numbers, which don't depend on how many are drawn, and what the step changes (buffers, metrics, attributes of modules,
parameters) is put back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from lightning_dist.parallel.pipeline.failures import Failure, raise_failure
from lightning_dist.parallel.pipeline.outcome import Outcome, batch_norm, compare
from lightning_dist.parallel.pipeline.stages import Stages
from lightning_dist.parallel.pipeline.step_state import SplitBatch, StepInFlight
from lightning_dist.random_states import kept_random_states


class MicrobatchCheck:
    """Compares steps over microbatches with the same over the whole batch; see [Note: microbatches are compared].

    Args:
        stages: of the module.
        begin: makes a step of its name and a batch.
        rehearse: runs such a step without gradients or random numbers, and leaves nothing of it.
        group: the ranks of the pipeline.
        device: of this rank.
        divides: whether ranks may have parts only of the parameters of their stages.
        enabled: whether anything is compared.
    """

    def __init__(
        self,
        stages: Stages,
        begin: Callable[[str, SplitBatch], StepInFlight],
        rehearse: Callable[[StepInFlight], Outcome],
        group: dist.ProcessGroup,
        device: torch.device,
        divides: bool,
        enabled: bool,
    ) -> None:
        self._stages, self._begin, self._rehearse, self._divides = stages, begin, rehearse, divides
        self._group, self._device, self._enabled = group, device, enabled
        self._paths: dict[Any, set[frozenset[Any]]] = {}
        """The paths of steps that gave the same over microbatches as over the whole batch, by kind of step."""
        self._written_alike: set[str] = set()
        """Parameters that a step writes to, as often as it has microbatches, with the result of once."""

    def before_step(self, step: StepInFlight) -> None:
        """Compares a step of a kind that was not compared yet.

        Communication over the world: one all-reduce of 16 bytes, for the first steps of a kind.

        Raises:
            Exception: it differs; or what one of its microbatches raised, on any rank.
        """
        if not self._enabled or step.kind in self._paths:
            return
        has_several = len(step.batch.parts) > 1
        failure = self._compared(step) if has_several else None
        if raise_where_any_failed(failure, has_several, self._device):
            self._paths[step.kind] = {step.path}

    def is_new(self, step: StepInFlight) -> bool:
        """Whether a step that has run took another path than those of its kind that were compared."""
        paths = self._paths.get(step.kind)
        if paths is None or len(step.batch.parts) == 1 or len(paths) >= _MOST_PATHS:
            return False
        return step.path not in paths

    def after_step(self, step: StepInFlight) -> None:
        """Compares a step whose path is new to a rank of the pipeline: on all, before its gradients are put in place.

        Communication over the pipeline: one all-reduce of 16 bytes.
        """
        step.effects.put_back()
        failure = self._compared(step) if len(step.batch.parts) > 1 else None
        raise_where_any_failed(failure, True, self._device, self._group)
        self._paths.setdefault(step.kind, set()).add(step.path)

    def _compared(self, step: StepInFlight) -> Failure | None:
        """What differs between a step over several microbatches and over the whole batch, or fails in one of them."""
        if norm := batch_norm(step.module, {name for plan in step.plans for name in plan.called}):
            return Failure(ValueError(norm), 0)
        if written := sorted(name for name in step.written if not self._runs_alone(name)):
            return Failure(RuntimeError(written_parameter(step.name, written[0])), 0)
        with kept_random_states(self._device):
            over_parts = self._begin(step.name, step.batch)
            of_parts = self._rehearse(over_parts)
            over_whole = self._begin(step.name, step.batch.unsplit())
            of_whole = self._rehearse(over_whole)
        failure = over_parts.failure or over_whole.failure
        if failure is None and (difference := compare(step.name, of_whole, of_parts, len(step.batch.parts))):
            failure = Failure(ValueError(difference), self._stages.num_stages)
        self._written_alike |= of_parts.written.keys()
        return failure

    def refuse_writes(self, step: StepInFlight, seen: set[str]) -> None:
        """Raises where the step itself writes to parameters.

        Args:
            step: that has run.
            seen: names of those that this rank holds and that were written to.

        Raises:
            RuntimeError: there are some that were not compared.
        """
        if written := sorted((seen | step.written) - self._written_alike):
            raise RuntimeError(written_parameter(step.name, written[0]))

    def _runs_alone(self, name: str) -> bool:
        """Whether a parameter's stage runs the backward of a microbatch before the next one's forward: else a write to
        it would change what the backward needs.
        """
        last = self._stages.num_stages - 1
        return self._stages.schedule.name == "1F1B" and self._stages.owners[name] == (last,) and not self._divides


_MOST_PATHS = 16
"""How many paths of a kind of step are compared."""


def written_parameter(step: str, name: str) -> str:
    """The sentence for a step that writes to a parameter."""
    return (
        f"pp: {step} changes the parameter {name} in place, which each of its microbatches would do, and for "
        "parameters of this rank's stages only; do so in on_train_batch_end, where all of them are there"
    )


def raise_where_any_failed(
    failure: Failure | None, compared: bool, device: torch.device, group: dist.ProcessGroup | None = None
) -> bool:
    """Raises on every rank of a group where one has found something.

    Communication over the group: one all-reduce of 8 bytes.

    Args:
        failure: what this rank found, or met.
        compared: whether this rank's batch had several microbatches to compare.
        device: of this rank.
        group: of the ranks; None for the world.

    Returns:
        Whether all ranks have compared.

    Raises:
        Exception: the first failure; of a comparison, a ValueError.
    """
    verdict = torch.tensor([int(failure is None), int(compared)], device=device)
    dist.all_reduce(verdict, dist.ReduceOp.MIN, group=group)
    nothing_failed, all_compared = verdict.tolist()
    if not nothing_failed:
        raise_failure(failure, group, device)
    return bool(all_compared)
