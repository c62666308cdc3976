"""The microbatches of a step go through the stages of a rank: by a schedule of torch, or in plain order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from lightning_dist.parallel.pipeline.p2p import P2PTensors, Tensors
from lightning_dist.parallel.pipeline.stages import Pipeline


class RunsMicrobatches(Protocol):
    """What a schedule calls: a stage's forward of one microbatch of a step."""

    def __call__(self, step: Any, stage: int, index: int, received: Tensors) -> Tensors:
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
        self._run, self.stage, self._trained = run, stage, trained

    def forward(self, *received: Tensor, step: Any, index: int) -> Any:
        sent = self._run(step, self.stage, index, received)
        return sent if len(sent) > 1 else sent[0]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the stage; they are not registered, so the module does not hold them twice."""
        return iter(self._trained())


_PARTS = {"forward": "forward_one_chunk", "backward": "backward_one_chunk", "weights": "backward_weight_one_chunk"}
"""Methods of torch's stages that a schedule calls, by what they do."""


def torch_schedule(
    pipeline: Pipeline,
    run: RunsMicrobatches,
    trained_by: Callable[[int], list[nn.Parameter]],
    p2p: list[P2PTensors],
    num_microbatches: int,
    timeline: Timeline,
) -> Any:
    """A schedule of torch for batches of one shape; :func:`run_torch_schedule` runs it.

    Args:
        run: runs a microbatch.
        trained_by: gives the parameters that a stage trains.
        p2p: what is sent over each cut of the pipeline.
        timeline: notes when its parts run.
    """
    made = [_torch_stage(pipeline, StageModule(run, stage, partial(trained_by, stage)), p2p) for stage in pipeline.own]
    for stage in made:
        for part, name in _PARTS.items():
            setattr(stage, name, timeline.timed(part, stage.stage_index, getattr(stage, name)))
    kind: Any = get_schedule_class(pipeline.stages.schedule.name)
    # a microbatch's weight is in its loss
    stages = made if len(made) > 1 else made[0]
    return kind(stages, num_microbatches, loss_fn=lambda output, _: output.sum(), scale_grads=False)


def _torch_stage(pipeline: Pipeline, module: StageModule, p2p: list[P2PTensors]) -> PipelineStage:
    stage, device = module.stage, pipeline.device
    loss = torch.empty(1, device=device, requires_grad=True)
    args = p2p[stage - 1].examples(device, True) if stage else ()
    sent = p2p[stage].examples(device, True) if stage < len(p2p) else loss
    return PipelineStage(module, stage, len(p2p) + 1, device, input_args=args, output_args=sent, group=pipeline.group)


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
        step: of whose batch they are; its ``p2p`` is what is sent over each cut of the pipeline.
    """

    def __init__(self, run: RunsMicrobatches, step: Any, pipeline: Pipeline) -> None:
        self._run, self._p2p, self._pipeline = partial(run, step), step.p2p, pipeline
        self._local: dict[tuple[int, int], Tensors] = {}
        self._sends: list[tuple[dist.Work | None, Tensor]] = []

    def forward(self, num_microbatches: int) -> None:
        with torch.no_grad():
            for stage in self._pipeline.own:
                for index in range(num_microbatches):
                    self._pass_on(stage, index, self._run(stage, index, self._received(stage, index)))
        self._finish()

    def forward_and_backward(self, num_microbatches: int) -> None:
        kept = {}
        for stage in self._pipeline.own:
            for index in range(num_microbatches):
                received = tuple(t.detach().requires_grad_() for t in self._received(stage, index))
                sent = self._run(stage, index, received)
                kept[stage, index] = received, sent
                self._pass_on(stage, index, tuple(t.detach() for t in sent))
        for stage in reversed(self._pipeline.own):
            for index in range(num_microbatches):
                received, sent = kept.pop((stage, index))
                torch.autograd.backward(sent, None if stage == len(self._p2p) else self._from(stage + 1, stage, index))
                if stage:
                    self._to(
                        stage - 1, index, tuple(torch.zeros_like(t) if t.grad is None else t.grad for t in received)
                    )
        self._finish()

    def _received(self, stage: int, index: int) -> Tensors:
        return self._from(stage - 1, stage, index) if stage else ()

    def _pass_on(self, stage: int, index: int, sent: Tensors) -> None:
        if stage < len(self._p2p):
            self._to(stage + 1, index, sent)

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
            return
        rank = self._pipeline.stages.rank_of(target)
        for tensor in map(Tensor.contiguous, sent):
            self._sends.append((dist.isend(tensor, group=self._pipeline.group, group_dst=rank), tensor))

    def _finish(self) -> None:
        for work, _ in self._sends:
            if work is not None:
                work.wait()
        self._sends.clear()


class Event(NamedTuple):
    """A part of a step; times in seconds since its start on this rank.

    ``kind`` is ``"forward"``, ``"backward"`` or, of schedules that compute them apart, ``"weights"``.
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
