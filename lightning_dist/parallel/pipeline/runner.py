"""The runner of steps under ``pp``: the way of a batch from Lightning's call to the user's own step in each stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_dist.collectives import host_group
from lightning_dist.compat.lightning import running_loop
from lightning_dist.compat.torch import assert_async, scale_on_device
from lightning_dist.layout import ParallelMesh
from lightning_dist.logs.microbatches import RecordedLogs
from lightning_dist.parallel.buffers import WrittenBuffers
from lightning_dist.parallel.fsdp import FSDPRunner
from lightning_dist.parallel.pipeline import manual_optimization
from lightning_dist.parallel.pipeline.gradient_averaging import GradientAveraging
from lightning_dist.parallel.pipeline.microbatch_check import MicrobatchCheck, left_in_parts, outcome
from lightning_dist.parallel.pipeline.p2p import Ended, Tensors, first_link
from lightning_dist.parallel.pipeline.parameter_view import ParameterView
from lightning_dist.parallel.pipeline.schedule import PipelineOptions
from lightning_dist.parallel.pipeline.schedule_runs import InOrder, Timeline, torch_schedule
from lightning_dist.parallel.pipeline.stage_gradients import HandOver, StageGradients
from lightning_dist.parallel.pipeline.stage_owner import plain_parameters, staged_parameters
from lightning_dist.parallel.pipeline.stage_plans import StagePlans
from lightning_dist.parallel.pipeline.stages import PartitionedModule, Pipeline, share_buffers
from lightning_dist.parallel.pipeline.step_effects import Effects, StepEffects, detached, marked, pack, share
from lightning_dist.parallel.pipeline.step_state import SplitBatch, StepInFlight, raise_failure
from lightning_dist.parallel.pipeline.trace import loss_of
from lightning_dist.parallel.rehearsal import FixedNumbers, undone
from lightning_dist.parallel.single_process import SingleProcessRunner
from lightning_dist.patches import Patches
from lightning_dist.placeholder import held, is_placeholder
from lightning_dist.random_states import kept_random_states, seed_microbatch


class PipelineRunner(SingleProcessRunner):
    """Every rank of the axis runs the user's step on the same microbatches, from one cut of the network to the next.

    [Note: the way of a batch under pp]
    :meth:`run` splits the batch, and gives the microbatches to a schedule. The schedule calls a
    :class:`~.schedule_runs.StageModule` of each stage with the step and a microbatch's index, and that
    :meth:`_microbatch`; :meth:`_run_stage` takes what was received, and has the data axis' runner call the user's step,
    around which :class:`~.stage_forward.StageForward` leaves the modules of other stages out. At the end
    :meth:`_on_all_ranks` gives every rank what the step returned, and a loss whose backward hands over gradients.

    Communication over the axis, per step: for each cut and microbatch one send of the tensors that cross it and, in
    training, one back with their gradients; one all-reduce of 32 bytes with the loss (two, beside devices), and one
    broadcast of what else the step returned or kept, if it did. Per backward pass that reduces: one all-reduce of the
    gradients of parameters that are tied over a cut, among the ranks that hold them. Over the data ranks, where nothing
    is sharded: see :class:`~.gradient_averaging.GradientAveraging`.

    Args:
        mesh: of the layout.
        inner: runs a step on this rank, with sharded parameters or with plain ones.
        data_group: the ranks with other samples, whose gradients are averaged here; None where ``inner`` does it.
    """

    module: pl.LightningModule

    def __init__(
        self,
        module: pl.LightningModule,
        partitioned: PartitionedModule,
        options: PipelineOptions,
        mesh: ParallelMesh,
        device: torch.device,
        inner: SingleProcessRunner,
        data_group: dist.ProcessGroup | None,
        patches: Patches,
    ) -> None:
        super().__init__(module)
        self.stages, self.group, self.inner = partitioned.stages, mesh.root["pp"].get_group(), inner
        self._pipeline = pipeline = Pipeline(self.stages, self.group, device)
        self._host_group = host_group(self.group, mesh.pipelines, device)
        self._hosts_of_data: dist.ProcessGroup | None = None
        """Data ranks that have to have as many microbatches."""
        if isinstance(inner, FSDPRunner) and options.reshard:
            self._hosts_of_data = host_group(inner.group, mesh.data_groups, device)
        self._options, self._device = options, device
        self.buffers = inner.buffers if data_group is None else WrittenBuffers(module, data_group)
        self._last = self.stages.num_stages - 1
        self.timeline = Timeline(device)
        """When stages ran, in the steps that torch's schedules run."""
        divides = isinstance(inner, FSDPRunner) or inner.tensor is not None
        self._plans = StagePlans(module, partitioned, device)
        averaging = None if data_group is None else GradientAveraging(data_group, device)
        self._gradients = StageGradients(module, pipeline, mesh.pipelines, averaging)
        self._view = ParameterView(module, pipeline, divides, patches)
        begin = partial(self._begin, alike=True)
        self._check = MicrobatchCheck(pipeline, begin, self._rehearsed, divides, options.check)
        self._schedules: dict[Any, Any] = {}
        self._trained: dict[int, list[nn.Parameter]] = {}
        """Parameters of each stage of this rank, once a schedule asked."""

    @property
    def place(self) -> tuple[int, int]:
        """The rank in the pipeline, and that of the last stage."""
        return dist.get_rank(self.group), self.stages.last_rank

    def run(self, step: str, *args: Any, **kwargs: Any) -> Any:
        with plain_parameters(self.module.parameters()):
            running = self._begin(step, self._split(args[0], args[1:]))
            self._check.before_step(running)
            result, loss = self._run(running)
        if running.is_manual and loss is not None:
            self._optimize_manually(running, loss)
        return result

    def _run(self, step: StepInFlight) -> tuple[Any, Tensor | None]:
        """What a step returned, and the loss whose backward hands gradients over; None where nothing is trained."""
        trains = step.name == "training_step" and torch.is_grad_enabled()
        versions = self._view.versions()
        with step.logs.recording(), self._own_random_streams(step, trains), step.computing():
            if trains:
                step.loss_scale = self._scale()
                self._train(step)
            else:
                self._evaluate(step)
            self.inner.reshard()  # what hooks see before the backward is this rank's part
        with step.failing(self.stages.num_stages):
            pairs = zip(self._view.versions(), versions, strict=True)
            self._check.refuse_writes(step, {name for (name, now), (_, then) in pairs if now != then})
        return self._on_all_ranks(step, trains)

    def _train(self, step: StepInFlight) -> None:
        """Every microbatch forward and backward; gradients are set aside until the loss's backward."""
        self._trained = {}  # what is gathered stays the same while a step lasts
        last_backward = self._gradients.last_backward
        completed_in = step.users if self.reduces else None
        with self._gradients.aside(self._plain_parameters(), self._view.zeroed(), completed_in), self._holding():
            if step.batch.in_order:
                InOrder(self._microbatch, step, self._pipeline, last_backward).forward_and_backward()
                return
            key = len(step.batch.parts), tuple(step.p2p)
            run = self._schedules.pop(key, None) or torch_schedule(
                self._pipeline, self._microbatch, self._trained_by, step, self.timeline, last_backward
            )
            self._schedules[key] = run  # the last used at the end
            if len(self._schedules) > MOST_SCHEDULES:
                del self._schedules[next(iter(self._schedules))]
            run(step)

    def _evaluate(self, step: StepInFlight) -> None:
        with self._holding():
            InOrder(self._microbatch, step, self._pipeline).forward()

    def _microbatch(self, step: StepInFlight, stage: int, index: int, received: Tensors) -> Tensors:
        """Runs it in a stage; after a failure, zeros: see [Note: a step that fails on one stage]."""
        if step.failure is None:
            with step.failing(stage):
                return self._run_stage(step, stage, index, received)
        return self._zeros(step, stage, index, received)

    def _run_stage(self, step: StepInFlight, stage: int, index: int, received: Tensors) -> Tensors:
        """From what the stage before sent, through the user's step, to what goes to the next."""
        forward = step.plans[index].forwards[stage]
        found, link = self._unpacked(step, stage, index, received)
        number = 0 if step.alike else index
        seed_microbatch(self._device, step.seed, number)

        def on_entry() -> None:
            seed_microbatch(self._device, step.seed, number, stage)
            step.logs.enter()

        def pass_through(*args: Any) -> Tensors:
            users_step = partial(self.inner.users_step(step.name), *args)
            sent, output = forward.run(self.module, users_step, found, on_entry)
            if forward.exit is None:
                return (self._ended(step, index, output, link),)
            return step.p2p[stage].pack(link, sent)

        with step.microbatch(stage, index):
            return self.inner.call(pass_through, step.batch.parts[index], *step.batch.others)

    def _unpacked(self, step: StepInFlight, stage: int, index: int, received: Tensors) -> tuple[list[Tensor], Tensor]:
        if not stage:
            return [], first_link(self._device)
        return step.p2p[stage - 1].unpack(step.plans[index].points[stage - 1], received)

    def _zeros(self, step: StepInFlight, stage: int, index: int, received: Tensors) -> Tensors:
        link = self._unpacked(step, stage, index, received)[1]
        if stage == self._last:
            return (Ended.apply(link, torch.zeros((), device=self._device)),)
        boundary = step.plans[index].points[stage].boundary
        zeros = [torch.zeros(t.tensor.shape, dtype=t.tensor.dtype, device=self._device) for t in boundary]
        return step.p2p[stage].pack(link, zeros)

    def _ended(self, step: StepInFlight, index: int, output: Any, link: Tensor) -> Tensor:
        """The last stage's: the loss of a microbatch, multiplied with its share of the batch."""
        step.outputs[index] = detached(output)
        if step.name != "training_step" or not torch.is_grad_enabled():
            return link.reshape(1)
        loss = step.losses.get(index) if step.is_manual else loss_of(output)
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
        if not step.weights[index]:  # its loss may be a mean over nothing
            return Ended.apply(link, torch.zeros((), device=self._device))
        share = step.loss_scale * (step.weights[index] / sum(step.weights))
        return Ended.apply(link, loss.reshape(()) * share)

    def _on_all_ranks(self, step: StepInFlight, trains: bool) -> tuple[Any, Tensor | None]:
        """What the step returned, on every rank; its loss with a backward that hands the gradients over."""
        loss, output = self._shared(step, trains, self._options.outputs or step.name == "predict_step")
        if not trains:
            return output, None
        anchor = torch.zeros((), device=self._device, requires_grad=True)
        loss = HandOver.apply(anchor, partial(self._hand_over, step.loss_scale), loss)
        if step.is_manual:
            return output, loss
        return (loss if output is None else {**output, "loss": loss}), loss

    def _shared(self, step: StepInFlight, trains: bool, shares: bool) -> tuple[Tensor, Any]:
        """The loss of a step that has run, and what it returned beside; leaves what the step kept in the module.

        Communication over the axis: one all-reduce of 32 bytes with the loss, a size, and the numbers of ranks that
        failed, and that took another path than before; beside devices, one of 8 and one of 24 among their hosts. One
        broadcast of what else there is to share, see [Note: what the last stage made]. Raises what a stage met, see
        [Note: a step that fails on one stage].
        """
        loss, output, effects, payload = torch.zeros((), device=self._device), None, Effects(), b""
        has_last = self._pipeline.has_last
        with step.failing(self.stages.num_stages):
            if has_last:
                loss, output = step.result(trains, loss)
                effects = step.effects.joined(step.batch.sizes, step.weights)
                effects.attributes = marked(effects.attributes)
                payload = pack(output, effects) if shares else b""
            if not step.is_manual:
                step.logs.replay()
        numbers = len(payload), int(step.failure is not None), int(self._check.is_new(step))
        whole, (size, num_failed, num_new) = self._summed(loss, numbers)
        if num_new and not num_failed:
            self._check.after_step(step)
        if num_failed:
            raise_failure(step.failure, self.group, self._device)
        if size:
            output, effects = share(payload, size, self._pipeline)
        step.effects.leave(effects)
        value = whole.to(loss.dtype if has_last else torch.get_default_dtype())
        return (value.float() if value.dtype.itemsize < 4 else value), output

    def _summed(self, loss: Tensor, numbers: tuple[int, ...]) -> tuple[Tensor, list[int]]:
        """The loss, in float64, and what the hosts tell, over the stages; see :meth:`_shared`."""
        loss = loss.to(torch.float64, copy=True)  # ranks may not know in which dtype the last stage computes it
        if self._host_group is self.group:
            both = torch.cat([loss.reshape(1), torch.tensor(numbers, dtype=torch.float64)])
            dist.all_reduce(both, group=self.group)
            return both[0], [int(number) for number in both[1:].tolist()]
        shared = dist.all_reduce(loss, group=self.group, async_op=True)
        told = torch.tensor(numbers, device="cpu")
        dist.all_reduce(told, group=self._host_group)  # no host waits for its device
        shared.wait()
        return loss, told.tolist()

    def _split(self, whole: Any, others: tuple[Any, ...]) -> SplitBatch:
        splitter, options = self._options.splitter, self._options
        size = splitter.size(whole)
        number = options.microbatches(size, self.stages.num_ranks)
        num_parts, in_order = number or min(size, options.num_microbatches or size), number is None
        if self._hosts_of_data is not None:  # each microbatch gathers the shards anew
            agreed = torch.tensor([num_parts, int(not in_order)], device="cpu")
            dist.all_reduce(agreed, dist.ReduceOp.MIN, group=self._hosts_of_data)
            num_parts, in_order = int(agreed[0]), not int(agreed[1])
        parts, sizes = splitter.split(whole, num_parts)
        return SplitBatch(whole, others, parts, sizes, in_order or len(parts) < num_parts)

    def _begin(self, name: str, batch: SplitBatch, alike: bool = False) -> StepInFlight:
        plans = self._plans.of(name, batch.parts, batch.others)
        weights = self._options.weights(batch.parts, batch.sizes)
        is_constant = partial(self._plans.logs_constant, self._options.splitter, name, batch.whole, batch.others)
        logs = RecordedLogs(self.module, weights, is_constant)
        return StepInFlight(self.module, name, batch, weights, plans, logs, alike)

    @contextmanager
    def _own_random_streams(self, step: StepInFlight, trains: bool) -> Iterator[None]:
        """Draws the step's seed from the data rank's stream, which goes on after it on every stage alike. Steps that
        evaluate leave the stream where it was, as they would in one process without random numbers; each takes another
        seed by its number in its loop, with which a run goes on that was interrupted.
        """
        if trains:
            step.seed = int(torch.randint(2**31, ()))
        with kept_random_states(self._device):
            if not trains:
                step.seed = int(torch.randint(2**31, ())) + self._num_evaluated()
            yield

    def _num_evaluated(self) -> int:
        """Of its validation in a fit, which goes on with that; else of all runs of its loop, so that two differ."""
        trainer = self.module.trainer
        loop = running_loop(trainer)
        progress = getattr(loop, "epoch_loop", loop).batch_progress
        return int((progress.current if trainer.state.fn == TrainerFn.FITTING else progress.total).ready)

    def _scale(self) -> Tensor | float:
        """What the loss will be multiplied with; half precision needs it before the backward."""
        trainer = self.module.trainer
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = scale_on_device(scaler) if scaler is not None and scaler.is_enabled() else 1.0
        return scale * self.weight / trainer.accumulate_grad_batches

    def _holding(self) -> AbstractContextManager[None]:
        """FSDPRunner parameters are gathered once for all microbatches, unless the user wants the memory."""
        if isinstance(self.inner, FSDPRunner):
            return self.inner.over_microbatches(self._options.reshard)
        return nullcontext()

    def _plain_parameters(self) -> list[nn.Parameter]:
        """Those whose gradients autograd itself puts in place; fully_shard puts those of what it gathers."""
        if isinstance(self.inner, FSDPRunner):
            return [*self.inner.unused.whole, *self.inner.unused.parts]
        return held(self.module.parameters())

    def _trained_by(self, stage: int) -> list[nn.Parameter]:
        if stage not in self._trained:
            named = self.module.named_parameters()
            self._trained[stage] = [p for name, p in named if stage in self.stages.owners[name] and p.requires_grad]
        return self._trained[stage]

    def _rehearsed(self, step: StepInFlight) -> dict[str, Any]:
        """What came of a step over microbatches, without gradients or random numbers; nothing is left of it."""
        named = self.module.named_parameters()
        parameters = {name: p for name, p in named if name in step.written and not is_placeholder(p)}
        with (
            undone(self.module, parameters.values()),
            torch.compiler.set_stance("force_eager"),
            FixedNumbers(),
            step.logs.recording(),
            step.computing(),
        ):
            self._evaluate(step)
            self.inner.reshard()
            found: dict[str, Any] = {}
            with step.failing(self.stages.num_stages):
                found = outcome(step, self._pipeline.has_last)
            written = {f"the parameter {n}, to which it writes,": p.detach().clone() for n, p in parameters.items()}
            return found | left_in_parts(self.module) | written

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        with super().accumulating(), self.inner.accumulating():
            yield

    def _hand_over(self, applied: Tensor | float, scale: Tensor) -> None:
        """Puts the gradients of the last schedule in place; called by the loss's backward."""
        ratio = scale / applied
        if self._view.is_undisturbed:  # so the scale is Lightning's, and the host need not look at it
            assert_async((ratio - 1).abs() < _ROUNDING, _SCALED.format(layout="pp", by="another number"))
        elif isinstance(self.inner, FSDPRunner) and abs(float(ratio) - 1) > _ROUNDING:
            raise ValueError(_SCALED.format(layout="pp with dp_shard", by=f"{float(ratio):.6g}"))
        alone = self._view.is_undisturbed or isinstance(self.inner, FSDPRunner)
        self._gradients.hand_over(None if alone else ratio)
        if isinstance(self.inner, FSDPRunner) and self.reduces:
            self.inner.reduce_held()

    @torch.no_grad()
    def after_backward(self) -> None:
        if self.reduces:
            self.inner.after_backward()
            self._gradients.reduce()
            if not self._view.is_scaled:
                self._view.show_gradients()

    def _optimize_manually(self, step: StepInFlight, loss: Tensor) -> None:
        """See [Note: a manual step over microbatches]."""
        batch = step.batch
        (plan,) = self._plans.of("training_step", [batch.whole], batch.others)
        effects = StepEffects(self.module)
        buffers = [(b, b.detach().clone()) for b in self.module.buffers() if not is_placeholder(b)]
        stepping = manual_optimization.stepping(self.module, loss, step.logs.replace)
        with kept_random_states(self._device), torch.enable_grad(), stepping:
            users_step = self.inner.users_step("training_step")
            plan.without_modules.run(self.module, partial(users_step, batch.whole, *batch.others))
        effects.forget()
        for buffer, value in buffers:
            buffer.detach().copy_(value)
        step.logs.replay()

    def show(self) -> None:
        self._view.show()

    def stepping(self, optimizer: Any) -> AbstractContextManager[None]:
        return self._view.stepping(optimizer)

    def hooked(self) -> AbstractContextManager[None]:
        return staged_parameters(self.module.parameters())

    def before_step_hooks(self) -> None:
        if self._view.is_scaled:
            self._view.show_gradients()

    def hide_gradients(self) -> None:
        self._view.hide_gradients()

    def forget_step(self) -> None:
        self._schedules.clear()
        self._gradients.forget()
        self.inner.forget_step()

    def reshard(self) -> None:
        self.inner.reshard()

    def validate_steps(self) -> None:
        self.inner.validate_steps()

    def buffers_of_others(self) -> set[str]:
        rank, stages = dist.get_rank(self.group), self.stages
        return {name for name, users in stages.buffers.items() if stages.rank_of(users[-1]) != rank}

    def share_buffers(self) -> None:
        share_buffers(self.module, self.stages, self.group)


MOST_SCHEDULES = 8
"""How many are kept, each with buffers for what its microbatches send: one a shape of batches."""

_ROUNDING = 1e-6
_SCALED = (
    "{layout}: the loss was scaled between training_step and its backward, by {by}; scale it inside of training_step"
)
