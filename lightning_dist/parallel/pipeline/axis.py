"""The pipeline axis in a step: microbatches through the stages, and gradients where autograd would have put them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_dist.logs.microbatches import RecordedLogs
from lightning_dist.parallel.data import STEPS, Alone, Sharded
from lightning_dist.parallel.flat import buckets, unflatten
from lightning_dist.parallel.pipeline import batches
from lightning_dist.parallel.pipeline.cuts import CutPoint
from lightning_dist.parallel.pipeline.nested import leaves
from lightning_dist.parallel.pipeline.passage import Passage
from lightning_dist.parallel.pipeline.schedule import InOrder, StageModule, run_torch_schedule, torch_schedule
from lightning_dist.parallel.pipeline.stages import Cut, PipelineOptions, Stages, points_in
from lightning_dist.parallel.pipeline.timeline import Timeline
from lightning_dist.parallel.pipeline.trace import loss_of, trace_step
from lightning_dist.parallel.pipeline.wire import Wire, first_link
from lightning_dist.parallel.usage import filled
from lightning_dist.placeholder import PIPELINE_SHARE, held, is_placeholder


class Route:
    """A step on microbatches of one shape: where it is cut, and how each stage runs it."""

    def __init__(self, points: list[CutPoint], passages: list[Passage]) -> None:
        self.points, self.passages = points, passages


class Pipelined(Alone):
    """Every rank of the axis runs the user's step on the same microbatches, from one cut of the network to the next.

    Communication over the axis, per step: for each cut and microbatch one send of the tensors that cross it and, in
    training, one back with their gradients; one broadcast of the loss. Per backward pass that reduces: one all-reduce
    of the gradients of parameters that are tied over a cut, among the ranks that hold them. Over the data ranks, where
    nothing is sharded: one all-reduce of the gradients, flat, and a small one of which were used.

    [Note: gradients of a schedule]
    A schedule computes gradients while Lightning runs ``training_step``; Lightning then zeroes them, and asks for the
    backward of a loss. So they are set aside, and the loss that is returned puts them in place in its backward, scaled
    by what Lightning scaled it with. A sharded parameter's gradient stays where fully_shard gathers it until then.

    Args:
        module: cut; :meth:`run_in` says what runs it on this rank.
        cut: its stages.
        options: the user's.
        group: the ranks of the axis.
        device: of this rank.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        cut: Cut,
        options: PipelineOptions,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        super().__init__(module)
        self.stages, self.skeleton = cut.stages, cut.skeleton
        stages = cut.stages
        self._options, self.group, self._device = options, group, device
        self._data_group: dist.ProcessGroup | None = None
        self._rank = dist.get_rank(group)
        self._own = stages.of_rank(self._rank)
        self._has_last = stages.num_stages - 1 in self._own
        self._rank_of = [stages.schedule.rank_of(stage, stages.num_ranks) for stage in range(stages.num_stages)]
        self.timeline = Timeline(device)
        """Of the steps that torch's schedules run."""
        self._tied = _tied_groups(self.module, stages, group)
        self._routes: dict[Any, Route] = {}
        self._schedules: dict[Any, Any] = {}
        self._constants: dict[tuple[str, str], bool] = {}
        self._step = _Step()
        self._aside: list[tuple[nn.Parameter, Tensor]] = []
        self._applied = 1.0
        """What the losses of the last schedule were multiplied with."""
        for name in STEPS:
            _stage_step(self.module, name)

    @property
    def place(self) -> tuple[int, int]:
        """The rank in the pipeline, and that of the last stage."""
        return self._rank, self.stages.last_rank

    def run_in(self, inner: Alone, data_group: dist.ProcessGroup | None = None) -> None:
        """What runs a step on this rank.

        Args:
            inner: with sharded parameters, or with plain ones; made after this, so that it gathers around a stage.
            data_group: the ranks with other samples, whose gradients are averaged here; None where ``inner`` does it.
        """
        self.inner, self._data_group = inner, data_group
        for name, parameter in self.module.named_parameters():
            if not is_placeholder(parameter):
                setattr(parameter, PIPELINE_SHARE, self.stages.num_ranks / len(self.stages.holders(name)))

    # ------------------------------------------------------------------ steps

    def run(self, step: str, *args: Any) -> Any:
        training = step == "training_step" and torch.is_grad_enabled()
        if training and not self.module.automatic_optimization:
            raise ValueError(
                "pp runs the backward of a step's microbatches inside of its schedule, and this module optimises "
                "manually: it would step once per microbatch. Use automatic optimisation, or another axis"
            )
        size = batches.batch_size(args[0])
        num_parts, in_order = self._num_microbatches(size)
        parts, sizes = batches.split(args[0], num_parts)
        routes = [self._route(step, part, args[1:]) for part in parts]
        wires = [Wire.of([route.points[cut] for route in routes]) for cut in range(self.stages.num_stages - 1)]
        logs = RecordedLogs(self.module, sizes, self._is_constant)
        self._step = _Step(step, parts, args[1:], sizes, routes, wires, logs, args[0])
        with self._step.logs.recording(), _own_random_streams(self._step, self._device):
            if not training:
                with self._holding():
                    self._in_order().forward(num_parts)
                self.inner.reshard()
            else:
                self._applied = self._scale()
                self._run_schedule(num_parts, in_order)
        output = batches.joined(self._step.outputs, sizes) if self._has_last else None
        self._step.logs.replay()
        result = self._with_loss(output) if training else self._shared(step, output)
        self._step = _Step()
        return result

    def _num_microbatches(self, size: int) -> tuple[int, bool]:
        """Of a batch of so many samples, and whether it runs in plain order, as too small for the schedule."""
        number = self._options.microbatches(size, self.stages.num_ranks)
        num_parts = number or min(size, self._options.num_microbatches or size)
        if not isinstance(self.inner, Sharded) or not self._options.reshard:
            return num_parts, number is None
        # each microbatch gathers the shards anew, so the data ranks have to have as many
        agreed = torch.tensor([num_parts, int(number is not None)], device=self._device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN, group=self.inner.group)
        return int(agreed[0]), not int(agreed[1])

    def _shared(self, step: str, output: Any) -> Any:
        """Predictions go to every rank of the axis; what other steps return stays on the last stage's."""
        if step != "predict_step":
            return output
        box = [output]
        dist.broadcast_object_list(box, group=self.group, group_src=self.stages.last_rank, device=self._device)
        return box[0]

    def _scale(self) -> float:
        """What Lightning will multiply the loss with; half precision needs it before the backward."""
        trainer = self.module.trainer
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        return float(scale) / trainer.accumulate_grad_batches

    def _run_schedule(self, num_parts: int, in_order: bool) -> None:
        parameters = self._plain
        before = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        with self._holding():
            if in_order:
                self._in_order().forward_and_backward(num_parts)
            else:
                run_torch_schedule(self._schedule(num_parts), num_parts, self._has_last)
        self._aside = [(p, p.grad) for p in parameters if p.grad is not None]
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient

    @property
    def _plain(self) -> list[nn.Parameter]:
        """Parameters whose gradients autograd itself puts in place; fully_shard puts the others."""
        return self.inner.usage.whole if isinstance(self.inner, Sharded) else held(self.module.parameters())

    def _holding(self) -> AbstractContextManager[None]:
        """Sharded parameters are gathered once for all microbatches, unless the user wants the memory."""
        if isinstance(self.inner, Sharded):
            return self.inner.over_microbatches(self._options.reshard)
        return nullcontext()

    def _schedule(self, num_parts: int) -> Any:
        key = num_parts, tuple(self._step.wires)
        if key not in self._schedules:
            stages = {stage: StageModule(self._microbatch, stage, partial(self._trained, stage)) for stage in self._own}
            self._schedules[key] = torch_schedule(
                self.stages.schedule, stages, self._step.wires, num_parts, self.group, self._device, self.timeline
            )
        return self._schedules[key]

    def _trained(self, stage: int) -> list[nn.Parameter]:
        named = self.module.named_parameters()
        return [p for name, p in named if stage in self.stages.owners[name] and p.requires_grad]

    def _in_order(self) -> InOrder:
        return InOrder(self._microbatch, self._own, self._rank_of, self._step.wires, self.group, self._device)

    # ------------------------------------------------------------------ a microbatch in a stage

    def _microbatch(self, stage: int, index: int, received: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        step = self._step
        passage = step.routes[index].passages[stage]
        if stage:
            found, link = step.wires[stage - 1].unpack(step.routes[index].points[stage - 1], received)
        else:
            found, link = [], first_link(self._device)
        _seed(step.seed, index)
        step.logs.begin(index, stage == 0, passage.sees_metrics)

        def enter() -> None:
            _seed(step.seed, index, stage)
            step.logs.enter()

        def passing(plain: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
            sent, output = passage.run(self.module, partial(plain, *args), found, enter)
            if passage.leave is None:
                return (self._end(index, output, link),)
            return step.wires[stage].pack(link, sent)

        vars(self.module)["_passing"] = passing
        try:
            return self.inner.run(step.name, step.parts[index], *step.rest)
        finally:
            vars(self.module).pop("_passing", None)
            step.logs.end()

    def _end(self, index: int, output: Any, link: Tensor) -> Tensor:
        """The last stage's: the loss of a microbatch, multiplied with its share of the batch."""
        step = self._step
        step.outputs[index] = _detached(output)
        if step.name != "training_step" or not torch.is_grad_enabled():
            return link.reshape(1)
        loss = loss_of(output)
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"pp: training_step returned {type(loss).__name__} as the loss of a microbatch; under pp a step can't "
                "be skipped, since the other stages run it already"
            )
        if is_placeholder(loss):
            raise ValueError(
                "pp: the loss depends on activations of another stage, which the first batch did not show: a value was "
                f"asked for there. Cuts: {', '.join(self.stages.cuts)}; name pipeline_cuts before that part"
            )
        share = step.sizes[index] / sum(step.sizes) * self._applied
        return _Ended.apply(link, loss.reshape(()) * share)

    # ------------------------------------------------------------------ shapes

    def _route(self, step: str, part: Any, rest: tuple[Any, ...]) -> Route:
        key = step, self.module.training, _signature(part)
        if key not in self._routes:
            self._routes[key] = self._traced(step, part, rest)
        return self._routes[key]

    def _traced(self, step: str, part: Any, rest: tuple[Any, ...]) -> Route:
        with kept_random_states(self._device):
            trace = trace_step(self.skeleton, self.module, step, part, rest)
        points = points_in(trace, self.stages)
        ends: list[CutPoint | None] = [None, *points, None]
        return Route(points, [Passage(trace, ends[i], ends[i + 1]) for i in range(len(points) + 1)])

    def _is_constant(self, name: str) -> bool:
        """Whether the step logs the same Python number for another number of samples; seen in a trace of some."""
        step = self._step
        if (step.name, name) not in self._constants:
            logged = []
            with kept_random_states(self._device):
                for count in (1, 2):
                    part = batches.first_samples(step.batch, count)
                    trace_step(self.skeleton, self.module, step.name, part, step.rest)
                    logged.append(self.skeleton.logged.get(name))
            self._constants[step.name, name] = logged[0] == logged[1]
        return self._constants[step.name, name]

    # ------------------------------------------------------------------ gradients

    def _with_loss(self, output: Any) -> Any:
        """What the step returned, with a loss whose backward hands the gradients over."""
        loss = loss_of(output) if self._has_last else torch.zeros((), device=self._device)
        value = loss.detach().reshape(()).to(self._device, torch.float32 if loss.dtype.itemsize < 4 else loss.dtype)
        value = value.double()  # ranks may not know in which dtype the last stage computes it
        dist.broadcast(value, group=self.group, group_src=self.stages.last_rank)
        value = value.to(loss.dtype if self._has_last else torch.get_default_dtype())
        handed = _HandOver.apply(torch.zeros((), device=self._device, requires_grad=True), self, value)
        if self._has_last and isinstance(output, dict):
            return {**{k: v for k, v in output.items() if not _holds_placeholder(v)}, "loss": handed}
        return handed

    @torch.no_grad()
    def hand_over(self, scale: Tensor) -> None:
        """Puts the gradients of the last schedule in place; called by the loss's backward."""
        ratio = float(scale) / self._applied
        for parameter, gradient in self._aside:
            if ratio != 1:
                gradient.mul_(ratio)
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)
        self._aside = []
        if isinstance(self.inner, Sharded):
            if abs(ratio - 1) > 1e-6:
                raise ValueError(
                    "pp with dp_shard: the loss was scaled between training_step and its backward, by "
                    f"{ratio:.6g}; scale it inside of training_step"
                )
            if self.reduces:
                self.inner.reduce_held()

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        with super().accumulating(), self.inner.accumulating():
            yield

    def before_backward(self, loss: Tensor) -> Tensor:
        return loss

    @torch.no_grad()
    def after_backward(self) -> None:
        if not self.reduces:
            return
        self.inner.after_backward()
        self._sum_tied()
        if self._data_group is not None:
            self._average()

    def _sum_tied(self) -> None:
        for names, group in self._tied:
            parameters = [p for name in names if (p := self.module.get_parameter(name)).requires_grad]
            if not parameters:
                continue
            gradients = [_local(filled(p)) for p in parameters]
            for same in buckets(gradients):
                flat = torch.cat([g.reshape(-1) for g in same])
                dist.all_reduce(flat, group=group)
                unflatten(flat, same)

    def _average(self) -> None:
        """Over the data ranks, of what any of them used; see [Note: a gradient that only some ranks have]."""
        assert self._data_group is not None
        parameters = [p for p in held(self.module.parameters()) if p.requires_grad]
        if not parameters:
            return
        used = torch.tensor([int(p.grad is not None) for p in parameters], device=self._device)
        dist.all_reduce(used, dist.ReduceOp.MAX, group=self._data_group)
        gradients = [_local(filled(p)) for p, is_used in zip(parameters, used.tolist(), strict=True) if is_used]
        for same in buckets(gradients):
            flat = torch.cat([g.reshape(-1) for g in same])
            dist.all_reduce(flat, group=self._data_group)
            unflatten(flat / dist.get_world_size(self._data_group), same)

    def reshard(self) -> None:
        self.inner.reshard()

    def share_buffers(self) -> None:
        """Every rank gets the buffers of the stage that uses them, and changes them (BatchNorm's statistics).

        Communication over the axis: one broadcast of a rank's buffers, flat.
        """
        buffers = dict(self.module.named_buffers())
        by_rank: dict[int, list[Tensor]] = {}
        for name, stages in self.stages.buffers.items():
            by_rank.setdefault(self._rank_of[stages[-1]], []).append(buffers[name])
        for rank, owned in sorted(by_rank.items()):
            for same in buckets(owned):
                flat = torch.cat([b.detach().reshape(-1) for b in same])
                dist.broadcast(flat, group=self.group, group_src=rank)
                unflatten(flat, same)


class _Step:
    """A batch on its way through the pipeline."""

    def __init__(
        self,
        name: str = "",
        parts: list[Any] | None = None,
        rest: tuple[Any, ...] = (),
        sizes: list[int] | None = None,
        routes: list[Route] | None = None,
        wires: list[Wire] | None = None,
        logs: Any = None,
        batch: Any = None,
    ) -> None:
        self.name, self.parts, self.rest, self.logs = name, parts or [], rest, logs
        self.batch = batch
        self.sizes, self.routes, self.wires = sizes or [], routes or [], wires or []
        self.outputs: list[Any] = [None] * len(self.parts)
        self.seed = 0


class _HandOver(torch.autograd.Function):
    """The loss of a finished schedule; see [Note: gradients of a schedule]."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, pipelined: Pipelined, loss: Tensor) -> Tensor:
        ctx.pipelined = pipelined
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        ctx.pipelined.hand_over(scale)
        return torch.zeros_like(scale), None, None


class _Ended(torch.autograd.Function):
    """The loss of a microbatch, which asks for gradients of what was received also where it does not depend on it."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, loss: Tensor) -> Tensor:
        return loss.reshape(1).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return torch.zeros((), dtype=torch.float32, device=gradient.device), gradient.reshape(())


def _stage_step(module: pl.LightningModule, name: str) -> None:
    """Puts the way from cut to cut around a step of the module; inside of what gathers sharded parameters."""
    plain = getattr(module, name, None)
    if plain is None or hasattr(plain, "passes"):
        return

    @wraps(plain)
    def staged(*args: Any) -> Any:
        passing = vars(module).pop("_passing", None)  # a step that calls another one runs it as it is
        return plain(*args) if passing is None else passing(plain, *args)

    staged.passes = True  # type: ignore[attr-defined]
    vars(module)[name] = staged


def _tied_groups(
    module: nn.Module, stages: Stages, group: dist.ProcessGroup
) -> list[tuple[list[str], dist.ProcessGroup]]:
    """Parameters that several ranks of the pipeline hold, by those ranks."""
    names: dict[tuple[int, ...], list[str]] = {}
    for name, _ in module.named_parameters():
        holders = stages.holders(name)
        if len(holders) > 1:
            names.setdefault(holders, []).append(name)
    ranks = dist.get_process_group_ranks(group)
    found = []
    for holders, tied in sorted(names.items()):
        if dist.get_rank(group) in holders:
            of_holders: Any = dist.new_group([ranks[holder] for holder in holders], use_local_synchronization=True)
            found.append((tied, of_holders))
    return found


# ---------------------------------------------------------------------- random numbers


def _seed(seed: int, index: int, stage: int | None = None) -> None:
    """Random numbers of a microbatch: up to a stage's entry the same on all stages, then the stage's own."""
    number = (seed * 1_000_003 + index * 1_009 + (0 if not stage else stage * 7_919 + 1)) % 2**31
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


@contextmanager
def _own_random_streams(step: _Step, device: torch.device) -> Iterator[None]:
    """Draws the step's seed from the data rank's stream, which goes on after it on every stage alike."""
    step.seed = int(torch.randint(2**31, ()))
    with kept_random_states(device):
        yield


@contextmanager
def kept_random_states(device: torch.device) -> Iterator[None]:
    """Leaves the generators of torch, Python and numpy as they were."""
    state, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python)
        np.random.set_state(numpy)
        if on_device is not None:
            torch.get_device_module(device).set_rng_state(on_device)


# ---------------------------------------------------------------------- values


def _signature(part: Any) -> Any:
    """What a step's path may depend on beside values: shapes and dtypes, and what is no tensor."""
    return tuple(
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf).__name__, _plain(leaf))
        for leaf in leaves(part)
    )


def _plain(leaf: Any) -> Any:
    return leaf if isinstance(leaf, (bool, int, type(None))) else None


def _detached(output: Any) -> Any:
    return batches.mapped(output, lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf)


def _holds_placeholder(value: Any) -> bool:
    return any(is_placeholder(leaf) for leaf in leaves(value))


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
