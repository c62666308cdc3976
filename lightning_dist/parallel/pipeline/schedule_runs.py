"""The microbatches of a step go through the stages of a rank: by a schedule of torch, or in plain order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from lightning_dist.parallel.pipeline.p2p import P2PTensors, Tensors
from lightning_dist.parallel.pipeline.stages import Pipeline

RunsMicrobatches = Callable[[Any, int, int, Tensors], Tensors]
"""A stage's forward of a microbatch, given the step, the stage, the microbatch's index, and what the stage before sent:
what goes to the next; of the last stage, its loss."""


class StageModule(nn.Module):
    """A stage as torch's schedules call it; the batch stays where it is: the step travels as an object.

    ``trained_by`` gives the parameters that a stage trains, whose gradients some schedules compute apart.
    """

    def __init__(self, run: RunsMicrobatches, stage: int, trained_by: Callable[[int], list[nn.Parameter]]) -> None:
        super().__init__()
        self._run, self.stage, self._trained_by = run, stage, trained_by

    def forward(self, *received: Tensor, step: Any, index: int) -> Any:
        sent = self._run(step, self.stage, index, received)
        return sent if len(sent) > 1 else sent[0]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the stage; they are not registered, so the module does not hold them twice."""
        return iter(self._trained_by(self.stage))


_PARTS = {"forward": "forward_one_chunk", "backward": "backward_one_chunk", "weights": "backward_weight_one_chunk"}
"""Methods of torch's stages that a schedule calls, by what they do."""


Around = Callable[[int], AbstractContextManager[Any]]
"""Gives what is to be around the backward of a stage's last microbatch."""


def torch_schedule(
    pipeline: Pipeline,
    run: RunsMicrobatches,
    trained_by: Callable[[int], Any],
    first: Any,
    timeline: Timeline,
    last_backward: Around = nullcontext,
) -> Callable[[Any], None]:
    """Runs every microbatch of steps of one shape forward and backward, by a schedule of torch; made for the first.

    ``trained_by`` gives the parameters that a stage trains; the timeline notes when the parts of the schedule run.
    """
    made = [_torch_stage(pipeline, StageModule(run, stage, trained_by), first.p2p) for stage in pipeline.own]
    for stage in made:
        for part, name in _PARTS.items():
            timed = timeline.timed(part, stage.stage_index, getattr(stage, name))
            setattr(stage, name, partial(_run_part, timed, partial(last_backward, stage.stage_index)))
    kind: Any = get_schedule_class(pipeline.stages.schedule.name)
    of_rank, numbers = made if len(made) > 1 else made[0], range(len(first.batch.parts))
    # a microbatch's weight is in its loss
    schedule = kind(of_rank, len(numbers), loss_fn=lambda output, _: output.sum(), scale_grads=False)

    def run_step(step: Any) -> None:
        targets = {"target_mbs": list(numbers), "losses": []} if pipeline.has_last else {}
        schedule.step(kwarg_mbs=[{"step": step, "index": i} for i in numbers], return_outputs=False, **targets)

    return run_step


def _run_part(
    own: Callable[..., Any], around: Callable[[], Any], *args: Any, last_backward: bool = False, **kw: Any
) -> Any:
    """A method of a stage of torch; its schedules say which call completes the stage's gradients."""
    if not last_backward:
        return own(*args, **kw)
    with around():
        return own(*args, last_backward=True, **kw)


def _torch_stage(pipeline: Pipeline, module: StageModule, p2p: list[P2PTensors]) -> PipelineStage:
    stage, device = module.stage, pipeline.device
    loss = torch.empty(1, device=device, requires_grad=True)
    args = p2p[stage - 1].examples(device, True) if stage else ()
    sent = p2p[stage].examples(device, True) if stage < len(p2p) else loss
    return PipelineStage(module, stage, len(p2p) + 1, device, input_args=args, output_args=sent, group=pipeline.group)


class InOrder:
    """Stage by stage, all microbatches forward, then all backward: for evaluation, and batches too small for others.

    Communication over the pipeline, for each cut and microbatch: one send of its tensors, and with a backward one back.
    See [Note: one stream a communicator].
    """

    def __init__(
        self, run: RunsMicrobatches, step: Any, pipeline: Pipeline, last_backward: Around = nullcontext
    ) -> None:
        self._last_backward = last_backward
        self._run, self._p2p, self._pipeline = partial(run, step), step.p2p, pipeline
        self._num_microbatches = len(step.batch.parts)
        self._local: dict[tuple[int, int], Tensors] = {}
        self._sends: list[tuple[dist.Work | None, Tensor]] = []

    def forward(self) -> None:
        with torch.no_grad():
            for stage, index in self._order(self._pipeline.own):
                self._to(stage + 1, index, self._run(stage, index, self._received(stage, index)))
        self._finish()

    def forward_and_backward(self) -> None:
        kept = {}
        for stage, index in self._order(self._pipeline.own):
            received = tuple(t.detach().requires_grad_() for t in self._received(stage, index))
            sent = self._run(stage, index, received)
            kept[stage, index] = received, sent
            self._to(stage + 1, index, tuple(t.detach() for t in sent))
        for stage, index in self._order(self._pipeline.own[::-1]):
            received, sent = kept.pop((stage, index))
            gradients = None if stage == len(self._p2p) else self._from(stage + 1, stage, index)
            is_last = index == self._num_microbatches - 1
            with self._last_backward(stage) if is_last else nullcontext():
                torch.autograd.backward(sent, gradients)
            if stage:
                back = (torch.zeros_like(t) if t.grad is None else t.grad for t in received)
                self._to(stage - 1, index, tuple(back))
        self._finish()

    def _order(self, stages: list[int]) -> Iterator[tuple[int, int]]:
        """Pairs of stage and microbatch.

        [Note: one stream a communicator]
        NCCL runs the sends and receives of a group one after the other, each until its peer has come to it. Where the
        stages go round the ranks, a rank that sends more microbatches than there are ranks between its stages waits for
        a peer that waits for it. So they run in rounds of one microbatch less than there are ranks.
        """
        size = max(1, dist.get_world_size(self._pipeline.group) - 1)
        for begin in range(0, self._num_microbatches, size):
            yield from product(stages, range(begin, min(begin + size, self._num_microbatches)))

    def _received(self, stage: int, index: int) -> Tensors:
        return self._from(stage - 1, stage, index) if stage else ()

    def _from(self, source: int, stage: int, index: int) -> Tensors:
        if source in self._pipeline.own:
            return self._local.pop((stage, index))
        found = self._p2p[min(source, stage)].examples(self._pipeline.device, False)
        for tensor in found:
            dist.recv(tensor, group=self._pipeline.group, group_src=self._pipeline.stages.rank_of(source))
        return found

    def _to(self, target: int, index: int, sent: Tensors) -> None:
        if target in self._pipeline.own:
            self._local[target, index] = sent
        elif target <= len(self._p2p):  # what the last stage gives stays there
            rank = self._pipeline.stages.rank_of(target)
            for tensor in map(Tensor.contiguous, sent):
                self._sends.append((dist.isend(tensor, group=self._pipeline.group, group_dst=rank), tensor))

    def _finish(self) -> None:
        for work, _ in self._sends:
            if work is not None:
                work.wait()
        self._sends.clear()


class Event(NamedTuple):
    """A part of a step, ``"forward"``, ``"backward"`` or, of schedules that compute them apart, ``"weights"``; times in
    seconds since the step's start on this rank.
    """

    kind: str
    stage: int
    microbatch: int
    begin: float
    end: float


class Timeline:
    """Notes when a schedule runs its parts, between :meth:`start` and :meth:`stop`; else it costs a comparison."""

    def __init__(self, device: torch.device) -> None:
        self.records, self._device = False, device
        self._events: list[Event] = []
        self._zero = 0.0

    def start(self, group: dist.ProcessGroup) -> None:
        """Starts to note, on all ranks at once. One barrier over the group."""
        self._events = []
        dist.barrier(group)
        self._zero, self.records = time.perf_counter(), True

    def stop(self) -> list[Event]:
        self.records = False
        return self._events

    def timed(self, kind: str, stage: int, run: Callable[..., Any]) -> Callable[..., Any]:
        """A part of a schedule, noted; its first argument is the number of the microbatch."""

        @wraps(run)
        def noted(index: int, *args: Any, **kwargs: Any) -> Any:
            if not self.records:
                return run(index, *args, **kwargs)
            begin = self._now()
            try:
                return run(index, *args, **kwargs)
            finally:
                self._events.append(Event(kind, stage, index, begin, self._now()))

        return noted

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - self._zero
