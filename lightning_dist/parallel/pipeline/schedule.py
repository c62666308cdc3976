"""Schedules of torch.distributed.pipelining by name; and a plain order for evaluation and for small batches."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from lightning_dist.parallel.pipeline.p2p import P2PTensors
from lightning_dist.parallel.pipeline.timeline import Timeline


@dataclass(frozen=True)
class Schedule:
    """What has to be known of a schedule before it runs.

    Args:
        name: as torch calls it.
        stages_per_rank: how many stages a rank has.
        style: ``"loop"``: the stages go round the ranks; ``"v"``: there and back again.
        least: the fewest microbatches, in multiples of the ranks; 0 for any number.
    """

    name: str
    stages_per_rank: int
    style: str
    least: int

    def num_stages(self, num_ranks: int) -> int:
        """Stages of the whole pipeline."""
        return self.stages_per_rank * num_ranks

    def rank_of(self, stage: int, num_ranks: int) -> int:
        """The rank that runs a stage."""
        turn, place = divmod(stage, num_ranks)
        return num_ranks - 1 - place if self.style == "v" and turn % 2 else place

    def stages_of(self, rank: int, num_ranks: int) -> list[int]:
        """The stages that a rank runs."""
        return [s for s in range(self.num_stages(num_ranks)) if self.rank_of(s, num_ranks) == rank]

    def takes(self, num_microbatches: int, num_ranks: int) -> bool:
        """Whether it can run so many microbatches."""
        rounds = max(1, num_microbatches // num_ranks) if "Interleaved" in self.name else 1
        return num_microbatches >= max(1, self.least * num_ranks) and num_microbatches % rounds == 0

    def bubble(self, num_microbatches: int, num_ranks: int) -> float:
        """The share of a step in which a rank waits, if all stages cost the same: (p - 1) / (v m + p - 1).

        Source: Narayanan et al., https://arxiv.org/abs/2104.04473, section 2.2.
        """
        return (num_ranks - 1) / (self.stages_per_rank * num_microbatches + num_ranks - 1)


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule("GPipe", 1, "loop", 0),
        Schedule("1F1B", 1, "loop", 1),
        Schedule("LoopedBFS", 2, "loop", 0),
        Schedule("Interleaved1F1B", 2, "loop", 1),
        Schedule("InterleavedZeroBubble", 2, "loop", 1),
        Schedule("ZBVZeroBubble", 2, "v", 1),
        Schedule("DualPipeV", 2, "v", 2),
    )
}


def schedule_named(name: str) -> Schedule:
    """The schedule of a name, in any case.

    Raises:
        ValueError: there is none, with the closest names.
    """
    known = {other.lower(): schedule for other, schedule in SCHEDULES.items()}
    if str(name).lower() in known:
        return known[str(name).lower()]
    close = difflib.get_close_matches(str(name).lower(), [*known], n=1, cutoff=0.4)
    hint = f"; did you mean {known[close[0]].name!r}?" if close else ";"
    raise ValueError(f"pipeline_schedule is {name!r}{hint} The schedules are {', '.join(SCHEDULES)}")


class RunsMicrobatches(Protocol):
    """What a schedule calls: a stage's forward of one microbatch of a step."""

    def __call__(self, step: Any, stage: int, index: int, received: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """From what the stage before sent to what goes to the next; of the last stage, its loss."""


class StageModule(nn.Module):
    """A stage as torch's schedules call it; the batch stays where it is: the step travels as an object.

    Args:
        run: runs a microbatch.
        stage: number of the stage.
        trained: gives the parameters that the stage trains, whose gradients some schedules compute apart.
    """

    def __init__(self, run: RunsMicrobatches, stage: int, trained: Callable[[], list[nn.Parameter]]) -> None:
        super().__init__()
        self._run, self._stage, self._trained = run, stage, trained

    def forward(self, *received: Tensor, step: Any, index: int) -> Any:
        """Runs microbatch number ``index`` of a step."""
        sent = self._run(step, self._stage, index, received)
        return sent if len(sent) > 1 else sent[0]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the stage; they are not registered, so the module does not hold them twice."""
        return iter(self._trained())


_PARTS = {"forward": "forward_one_chunk", "backward": "backward_one_chunk", "weights": "backward_weight_one_chunk"}
"""Methods of torch's stages that a schedule calls, by what they do."""


def torch_schedule(
    schedule: Schedule,
    stages: dict[int, StageModule],
    p2p: list[P2PTensors],
    num_microbatches: int,
    group: dist.ProcessGroup,
    device: torch.device,
    timeline: Timeline,
) -> Any:
    """A schedule of torch for batches of one shape; ``step(num_microbatches)`` runs it.

    Args:
        schedule: which.
        stages: of this rank.
        p2p: what is sent over each cut of the pipeline.
        num_microbatches: of a batch.
        group: the ranks of the pipeline.
        device: of this rank.
        timeline: notes when its parts run.
    """
    made = [_torch_stage(module, stage, p2p, group, device) for stage, module in sorted(stages.items())]
    for stage in made:
        for part, name in _PARTS.items():
            setattr(stage, name, timeline.timed(part, stage.stage_index, getattr(stage, name)))
    kind: Any = get_schedule_class(schedule.name)
    # a microbatch's weight is in its loss
    return kind(
        made[0] if schedule.stages_per_rank == 1 else made,
        num_microbatches,
        loss_fn=lambda output, _: output.sum(),
        scale_grads=False,
    )


def _torch_stage(
    module: StageModule, stage: int, p2p: list[P2PTensors], group: dist.ProcessGroup, device: torch.device
) -> PipelineStage:
    loss = torch.empty(1, device=device, requires_grad=True)
    received = p2p[stage - 1].examples(device, True) if stage else ()
    sent = p2p[stage].examples(device, True) if stage < len(p2p) else loss
    return PipelineStage(module, stage, len(p2p) + 1, device, input_args=received, output_args=sent, group=group)


def run_torch_schedule(made: Any, step: Any, num_microbatches: int, has_last: bool) -> None:
    """Runs every microbatch of a step forward and backward."""
    made.step(
        kwarg_mbs=[{"step": step, "index": index} for index in range(num_microbatches)],
        return_outputs=False,
        **({"target_mbs": list(range(num_microbatches)), "losses": []} if has_last else {}),
    )


class InOrder:
    """Stage by stage, all microbatches forward, then all backward: for evaluation, and batches too small for others.

    Communication over ``group``, for each cut and microbatch: one send of its tensors, and with a backward one back.

    Args:
        run: runs a microbatch.
        step: of whose batch they are.
        stages: of this rank.
        rank_of: of each stage, its rank in ``group``.
        p2p: what is sent over each cut of the pipeline.
        group: the ranks of the pipeline.
        device: of this rank.
    """

    def __init__(
        self,
        run: RunsMicrobatches,
        step: Any,
        stages: list[int],
        rank_of: list[int],
        p2p: list[P2PTensors],
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self._run, self._step, self._stages, self._rank_of = run, step, stages, rank_of
        self._wires, self._group, self._device = p2p, group, device
        self._here = dist.get_rank(group)
        self._local: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self._sends: list[tuple[dist.Work | None, Tensor]] = []

    def forward(self, num_microbatches: int) -> None:
        """Runs the stages of this rank on every microbatch, without a backward."""
        with torch.no_grad():
            for stage in self._stages:
                for index in range(num_microbatches):
                    self._pass_on(stage, index, self._run(self._step, stage, index, self._received(stage, index)))
        self._finish()

    def forward_and_backward(self, num_microbatches: int) -> None:
        """Runs the stages of this rank on every microbatch, and their backward."""
        kept = {}
        for stage in self._stages:
            for index in range(num_microbatches):
                received = tuple(t.detach().requires_grad_() for t in self._received(stage, index))
                sent = self._run(self._step, stage, index, received)
                kept[stage, index] = received, sent
                self._pass_on(stage, index, tuple(t.detach() for t in sent))
        for stage in reversed(self._stages):
            for index in range(num_microbatches):
                received, sent = kept.pop((stage, index))
                last = stage == len(self._wires)
                gradients = None if last else self._from(stage + 1, stage, index, self._wires[stage])
                torch.autograd.backward(sent, gradients)
                if stage:
                    grads = tuple(torch.zeros_like(t) if t.grad is None else t.grad for t in received)
                    self._to(stage - 1, stage, index, grads)
        self._finish()

    def _received(self, stage: int, index: int) -> tuple[Tensor, ...]:
        return self._from(stage - 1, stage, index, self._wires[stage - 1]) if stage else ()

    def _pass_on(self, stage: int, index: int, sent: tuple[Tensor, ...]) -> None:
        if stage < len(self._wires):
            self._to(stage + 1, stage, index, sent)

    def _from(self, source: int, stage: int, index: int, tensors: P2PTensors) -> tuple[Tensor, ...]:
        if self._rank_of[source] == self._here:
            return self._local.pop((stage, index))
        found = tensors.examples(self._device, False)
        for tensor in found:
            dist.recv(tensor, group=self._group, group_src=self._rank_of[source])
        return found

    def _to(self, target: int, stage: int, index: int, sent: tuple[Tensor, ...]) -> None:
        if self._rank_of[target] == self._here:
            self._local[target, index] = sent
            return
        for tensor in sent:
            tensor = tensor.contiguous()
            work = dist.isend(tensor, group=self._group, group_dst=self._rank_of[target])
            self._sends.append((work, tensor))

    def _finish(self) -> None:
        for work, _ in self._sends:
            if work is not None:
                work.wait()
        self._sends.clear()
