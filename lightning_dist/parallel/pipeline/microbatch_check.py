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

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dist.compat.torch import BatchNormBase, NormBase
from lightning_dist.logs.metrics import metrics_in
from lightning_dist.parallel.pipeline.stages import Pipeline
from lightning_dist.parallel.pipeline.step_effects import Effects
from lightning_dist.parallel.pipeline.step_state import Failure, SplitBatch, StepInFlight, raise_failure
from lightning_dist.parallel.pipeline.trace import number_kind
from lightning_dist.placeholder import is_placeholder
from lightning_dist.precision import rounds_products
from lightning_dist.random_states import kept_random_states


class MicrobatchCheck:
    """Compares steps over microbatches with the same over the whole batch; see [Note: microbatches are compared].

    Args:
        begin: makes a step of its name and a batch.
        rehearse: gives what came of such a step without gradients or random numbers, by what to call it.
        divides: whether ranks may have parts only of the parameters of their stages.
        enabled: whether anything is compared.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        begin: Callable[[str, SplitBatch], StepInFlight],
        rehearse: Callable[[StepInFlight], dict[str, Any]],
        divides: bool,
        enabled: bool,
    ) -> None:
        self._begin, self._rehearse, self._divides, self._enabled = begin, rehearse, divides, enabled
        self._stages, self._group, self._device = pipeline.stages, pipeline.group, pipeline.device
        self._paths: dict[Any, set[frozenset[Any]]] = {}
        """The paths of steps that gave the same over microbatches as over the whole batch, by kind of step."""
        self._written_alike: set[str] = set()
        """Parameters that a step writes to, as often as it has microbatches, with the result of once."""

    def before_step(self, step: StepInFlight) -> None:
        """Compares a step of a kind that was not compared yet; raises what differs, or what failed on any rank. One
        all-reduce of 16 bytes over the world, for the first steps of a kind.
        """
        if self._enabled and step.kind not in self._paths and self._agreed(step, None):
            self._paths[step.kind] = {step.path}

    def is_new(self, step: StepInFlight) -> bool:
        """Whether a step that has run took another path than those of its kind that were compared."""
        paths = self._paths.get(step.kind)
        if paths is None or len(step.batch.parts) == 1 or len(paths) >= _MOST_PATHS:
            return False
        return step.path not in paths

    def after_step(self, step: StepInFlight) -> None:
        """Compares a step whose path is new to a rank of the pipeline, on all, before its gradients are put in place:
        one all-reduce of 16 bytes over the pipeline.
        """
        step.effects.put_back()
        self._agreed(step, self._group)
        self._paths.setdefault(step.kind, set()).add(step.path)

    def _agreed(self, step: StepInFlight, group: dist.ProcessGroup | None) -> bool:
        """Whether all ranks of a group (None: of the world) had several microbatches; raises what one of them found."""
        has_several = len(step.batch.parts) > 1
        failure = self._compared(step) if has_several else None
        verdict = torch.tensor([int(failure is None), int(has_several)], device=self._device)
        dist.all_reduce(verdict, dist.ReduceOp.MIN, group=group)
        nothing_failed, all_compared = verdict.tolist()
        if not nothing_failed:
            raise_failure(failure, group, self._device)
        return bool(all_compared)

    def _compared(self, step: StepInFlight) -> Failure | None:
        """What differs between a step over several microbatches and over the whole batch, or fails in one of them."""
        if norm := _batch_norm(step.module, {name for plan in step.plans for name in plan.called}):
            return Failure(ValueError(norm), 0)
        if written := sorted(name for name in step.written if not self._runs_alone(name)):
            return Failure(RuntimeError(_written_parameter(step.name, written[0])), 0)
        with kept_random_states(self._device):
            over_parts = self._begin(step.name, step.batch)
            of_parts = self._rehearse(over_parts)
            over_whole = self._begin(step.name, step.batch.unsplit())
            of_whole = self._rehearse(over_whole)
        failure = over_parts.failure or over_whole.failure
        if failure is None and (difference := compare(step.name, of_whole, of_parts, len(step.batch.parts))):
            failure = Failure(ValueError(difference), self._stages.num_stages)
        self._written_alike |= {n for n in over_parts.written if not is_placeholder(step.module.get_parameter(n))}
        return failure

    def refuse_writes(self, step: StepInFlight, seen: set[str]) -> None:
        """Raises a RuntimeError where a step that has run wrote to parameters (on this rank: ``seen``), uncompared."""
        if written := sorted((seen | step.written) - self._written_alike):
            raise RuntimeError(_written_parameter(step.name, written[0]))

    def _runs_alone(self, name: str) -> bool:
        """Whether a parameter's stage runs the backward of a microbatch before the next one's forward: else a write to
        it would change what the backward needs.
        """
        last = self._stages.num_stages - 1
        return self._stages.schedule.name == "1F1B" and self._stages.owners[name] == (last,) and not self._divides


_MOST_PATHS = 16
"""How many paths of a kind of step are compared."""


def _written_parameter(step: str, name: str) -> str:
    return (
        f"pp: {step} changes the parameter {name} in place, which each of its microbatches would do, and for "
        "parameters of this rank's stages only; do so in on_train_batch_end, where all of them are there"
    )


ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Relative difference that is taken for rounding; where something is computed in 16 bits, ``COARSE_ROUNDING``."""

COARSE_ROUNDING = 0.05


def compare(step: str, whole: dict[str, Any], parts: dict[str, Any], num_parts: int) -> str:
    """What differs between the whole batch and its microbatches put together, in a sentence; empty if nothing does."""
    found = _first_difference((what, value, parts.get(what)) for what, value in whole.items())
    if not found:
        return ""
    return (
        f"pp: {step} over {num_parts} microbatches gives other numbers than over the whole batch at once: {found}. "
        "It is no mean over samples, or its batch is not split along its samples. Say with batch_split= how a batch is "
        "split, or with microbatch_weight= what a microbatch counts; or use num_microbatches=1, or another axis. "
        "pipeline_check=False trains on the mean of microbatches all the same"
    )


def _first_difference(pairs: Iterable[tuple[str, Any, Any]]) -> str:
    return next((found for pair in pairs if (found := _difference(*pair))), "")


def outcome(step: StepInFlight, has_last: bool) -> dict[str, Any]:
    """What came of a step that was tried, by what to call it; on ranks without the last stage, what it logged."""
    found: dict[str, Any] = {}
    effects = Effects()
    if has_last:
        found = {"what it returns": step.joined(), "the loss": step.manual_loss}
        effects = step.effects.joined(step.batch.sizes, step.weights)
    found.update({f"the logged {name!r}": value for name, value in step.logs.values().items()})
    for (name, key), value in effects.attributes.items():
        found[f"the attribute {name!r}" if key is None else f"the attribute {name!r}, {key!r},"] = value
    for (name, key), value in effects.numbers.items():
        found[f"the attribute {key!r} of {name!r}"] = value
    return found


def left_in_parts(module: nn.Module) -> dict[str, Any]:
    """What a step leaves in the parts of a module: buffers, numbers and lists. What metrics have is counted by them."""
    buffers = {name: buffer for name, buffer in module.named_buffers() if not is_placeholder(buffer)}
    found: dict[str, Any] = {f"the buffer {name}": buffer.detach().clone() for name, buffer in buffers.items()}
    inside = {id(child) for metric in metrics_in(module) for child in metric.modules()}
    for name, child in module.named_modules():
        for key, value in vars(child).items() if name and id(child) not in inside else ():
            if not key.startswith("_") and (number_kind(value) or type(value) is list):
                found[f"the attribute {key!r} of {name!r}"] = len(value) if type(value) is list else value
    return found


def _batch_norm(module: nn.Module, called: set[str]) -> str:
    """The sentence where a step runs a BatchNorm that normalises what it is given; empty where none does."""
    norms = ((name, norm) for name, norm in module.named_modules() if name in called and isinstance(norm, NormBase))
    for name, norm in norms:
        if norm.training and (isinstance(norm, BatchNormBase) or norm.track_running_stats):
            return (
                f"pp: {name} ({type(norm).__name__}) takes statistics of each microbatch, where one process takes "
                "those of the whole batch; use num_microbatches=1, a norm of each sample (GroupNorm, LayerNorm), "
                "eval() on it, or another axis. pipeline_check=False trains on the statistics of microbatches"
            )
    return ""


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
    return _first_difference(pairs)


def _is_close(parts: Tensor, whole: Tensor) -> bool:
    if not whole.is_floating_point():
        return bool(torch.isclose(parts.double(), whole.double(), rtol=1e-6).all())
    rounding = COARSE_ROUNDING if rounds_products(whole.device.type) else ROUNDING.get(whole.dtype, COARSE_ROUNDING)
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
