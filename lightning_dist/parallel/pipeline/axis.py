"""The pipeline axis in a step: microbatches through the stages, and gradients where autograd would have put them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_dist.collectives import broadcast_tensors
from lightning_dist.logs.code_scan import GRADIENTS, scan_hook
from lightning_dist.logs.microbatches import RecordedLogs
from lightning_dist.parallel.buffers import WrittenBuffers
from lightning_dist.parallel.data import STEPS, Alone
from lightning_dist.parallel.pipeline import by_hand, check
from lightning_dist.parallel.pipeline.failures import Failure, raise_together
from lightning_dist.parallel.pipeline.gradients import HandOver, StageGradients
from lightning_dist.parallel.pipeline.schedule import InOrder, StageModule, run_torch_schedule, torch_schedule
from lightning_dist.parallel.pipeline.shared_outputs import AppendedLists, KeptAttributes, detached, marked, pack, share
from lightning_dist.parallel.pipeline.staged import (
    Place,
    States,
    callable_parts,
    closed,
    opened,
    refuse_outside,
    staged,
)
from lightning_dist.parallel.pipeline.stages import Cut, PipelineOptions
from lightning_dist.parallel.pipeline.steps import Routes, Step
from lightning_dist.parallel.pipeline.timeline import Timeline
from lightning_dist.parallel.pipeline.trace import loss_of, trace_step
from lightning_dist.parallel.pipeline.wire import Wire, ended, first_link
from lightning_dist.parallel.rehearsal import undone
from lightning_dist.parallel.sharded import Sharded
from lightning_dist.placeholder import PIPELINE_SHARE, held, is_placeholder, placeholder
from lightning_dist.pytree import deep_leaves
from lightning_dist.random_states import kept_random_states, seed_microbatch


class Pipelined(Alone):
    """Every rank of the axis runs the user's step on the same microbatches, from one cut of the network to the next.

    Communication over the axis, per step: for each cut and microbatch one send of the tensors that cross it and, in
    training, one back with their gradients; one all-reduce of 32 bytes with the loss, and one broadcast of what else
    the step returned or kept, if it did. Per backward pass that reduces: one all-reduce of the gradients of parameters
    that are tied over a cut, among the ranks that hold them. Over the data ranks, where nothing is sharded: one
    all-reduce of the gradients, flat, and a small one of which were used.

    Args:
        module: cut; :meth:`run_in` says what runs it on this rank.
        cut: its stages.
        options: the user's.
        group: the ranks of the axis.
        device: of this rank.
    """

    module: pl.LightningModule

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
        self._gradients = StageGradients(module, stages, group, device)
        self._routes = Routes(module, cut, device)
        self._sees_gradients: bool | None = None
        """Whether the user's code looks at gradients; found out when there are some."""
        self._hidden: list[tuple[Any, Any]] = []
        """Gradients of other stages, while an optimizer steps."""
        self._by_hand: tuple[Tensor, RecordedLogs] | None = None
        """The loss, and the logs, of a manual step that has been computed, and not stepped yet."""
        self._schedules: dict[Any, Any] = {}
        self._constants: dict[tuple[str, str], bool] = {}
        self._num_evaluated = 0
        self._splitter = options.splitter
        self._shown: list[tuple[str, nn.Parameter]] = []
        """Parameters of this rank's stages, as the user's code sees them."""
        self._written_alike: set[str] = set()
        """Parameters that a step writes to, as often as it has microbatches, with the result of once."""
        self._checked: dict[Any, set[frozenset[Any]]] = {}
        """Kinds of steps that were seen to give the same over microbatches as over the whole batch, by their ways."""
        self._step = Step()
        self._applied = 1.0
        """What the losses of the last schedule were multiplied with."""
        self._users_steps = {name: _stage_step(self.module, name) for name in STEPS}

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
        self.buffers = inner.buffers if data_group is None else WrittenBuffers(self.module, data_group)
        for name, parameter in self.module.named_parameters():
            if not is_placeholder(parameter):
                setattr(parameter, PIPELINE_SHARE, self.stages.num_ranks / len(self.stages.holders(name)))

    # ------------------------------------------------------------------ what the user's code sees

    @property
    def _divides(self) -> bool:
        """Whether ranks may have parts only of the parameters of their stages."""
        return isinstance(self.inner, Sharded) or self.inner.tensor is not None

    def show(self) -> None:
        if self._divides:
            for child in callable_parts(self.module):
                if refuse_outside not in child._forward_pre_hooks.values():
                    child.register_forward_pre_hook(refuse_outside, prepend=True)
        self._shown = [(n, p) for n, p in self.module.named_parameters() if not is_placeholder(p)]
        for name, parameter in self.module.named_parameters():
            staged(parameter, Place(name, self.stages.holders(name)[0], self.group, self._divides))

    @contextmanager
    def stepping(self, optimizer: Any) -> Iterator[None]:
        States.show(optimizer)
        with closed(self.module.parameters()):
            yield
        if not self._is_scaled:  # hooks after the step find them as in one process
            for parameter, gradient in self._hidden:
                parameter.grad = gradient
        self._hidden = []

    def hooked(self) -> AbstractContextManager[None]:
        return opened(self.module.parameters())

    def before_step_hooks(self) -> None:
        if self._is_scaled:
            self._show_gradients()

    @property
    def _is_scaled(self) -> bool:
        """Whether a scaler goes through gradients between a backward and the hooks before the optimizer's step."""
        return getattr(self.module.trainer.precision_plugin, "scaler", None) is not None

    def hide_gradients(self) -> None:
        self._hidden = [(p, p.grad) for p in self.module.parameters() if is_placeholder(p) and p.grad is not None]
        for parameter, _ in self._hidden:
            parameter.grad = None

    def _show_gradients(self) -> None:
        """Where hooks look at gradients, those of other stages are there, without memory: to be sent, or to be refused.

        Communication over the axis: one all-reduce of a byte per parameter, where such a hook is.
        """
        if self._sees_gradients is None:
            self._sees_gradients = _gradients_are_seen(self.module)
        if not self._sees_gradients:
            return
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        has = [not is_placeholder(p) and p.grad is not None for p in parameters]
        flags = torch.tensor(has, dtype=torch.uint8, device=self._device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        for parameter, flag in zip(parameters, flags.tolist(), strict=True):
            if is_placeholder(parameter):
                parameter.grad = placeholder(parameter) if flag else None

    # ------------------------------------------------------------------ steps

    def run(self, step: str, *args: Any, **kwargs: Any) -> Any:
        with closed(self.module.parameters()):
            result = self._run(step, *args)
        waiting, self._by_hand = self._by_hand, None
        if waiting is not None:
            self._step_by_hand(*waiting, args)
        return result

    def _step_by_hand(self, loss: Tensor, logs: RecordedLogs, args: tuple[Any, ...]) -> None:
        """See [Note: a manual step over microbatches]."""
        (route,) = self._routes.of("training_step", [args[0]], args[1:])
        kept = KeptAttributes(self.module)
        lists = AppendedLists(self.module)
        buffers = [(b, b.detach().clone()) for b in self.module.buffers() if not is_placeholder(b)]
        with kept_random_states(self._device), torch.enable_grad(), by_hand.stepping(self.module, loss, logs.replace):
            route.ghost.run(self.module, partial(self._users_steps["training_step"], *args))
        kept.before_microbatch()
        lists.forget()
        for buffer, value in buffers:
            buffer.detach().copy_(value)
        logs.replay()

    def _refuse_writes(self, seen: set[str]) -> None:
        """Of parameters, by the step itself.

        Args:
            seen: names of those that this rank holds and that were written to.
        """
        traced = {name for route in self._step.routes for name in route.written}
        written = sorted((seen | traced) - self._written_alike)
        if written:
            raise RuntimeError(_write(self._step.name, written[0]))

    def _runs_alone(self, name: str) -> bool:
        """Whether a parameter's stage runs the backward of a microbatch before the next one's forward: else a write to
        it would change what the backward needs.
        """
        last = self.stages.num_stages - 1
        alone = self.stages.schedule.name == "1F1B" and self.stages.owners[name] == (last,)
        return alone and not self._divides

    def _versions(self) -> list[tuple[str, int]]:
        """Of this rank's parameters, by name: how often they were written to."""
        return [(name, parameter._version) for name, parameter in self._shown]

    def _run(self, step: str, *args: Any) -> Any:
        training = step == "training_step" and torch.is_grad_enabled()
        num_parts, in_order = self._num_microbatches(self._splitter.size(args[0]))
        parts, sizes = self._splitter.split(args[0], num_parts)
        if len(parts) < num_parts:
            num_parts, in_order = len(parts), True
        self._check(step, args, parts, sizes)
        self._begin(step, args, parts, sizes)
        versions = self._versions()
        with self._step.logs.recording(), self._own_random_streams(training), self._computing():
            if not training:
                with self._holding():
                    self._in_order().forward(num_parts)
                self.inner.reshard()
            else:
                self._applied = self._scale()
                self._run_schedule(num_parts, in_order)
                self.inner.reshard()  # what hooks see before the backward is this rank's part
        with self._failing(self.stages.num_stages):
            pairs = zip(self._versions(), versions, strict=True)
            self._refuse_writes({name for (name, now), (_, then) in pairs if now != then})
        result = self._on_all_ranks(training)
        self._step = Step()
        return result

    def _computing(self) -> AbstractContextManager[None]:
        step = self._step
        step.is_manual = step.name == "training_step" and not self.module.automatic_optimization
        if not step.is_manual:
            return nullcontext()
        return by_hand.computing(self.module, step.take)

    @contextmanager
    def _failing(self, stage: int) -> Iterator[None]:
        """What is raised inside is raised on all ranks at the end of the step; what comes after it, is not."""
        try:
            yield
        except Exception as error:
            self._step.failure = self._step.failure or Failure(error, stage)

    def _begin(self, step: str, args: tuple[Any, ...], parts: list[Any], sizes: list[int]) -> None:
        routes = self._routes.of(step, parts, args[1:])
        wires = [Wire.of([route.points[cut] for route in routes]) for cut in range(self.stages.num_stages - 1)]
        weights = self._options.weights(parts, sizes)
        logs = RecordedLogs(self.module, weights, self._is_constant)
        self._step = Step(step, parts, args[1:], sizes, weights, routes, wires, logs, args[0])
        self._step.appended, self._step.kept = AppendedLists(self.module), KeptAttributes(self.module)
        written = {place for route in routes for place in route.attributes}
        self._step.attributes = {place: self._attribute(place) for place in written}

    def _check(self, step: str, args: tuple[Any, ...], parts: list[Any], sizes: list[int]) -> None:
        """The first time that a kind of step runs; see [Note: microbatches are compared]."""
        kind = step, self.module.training, args[2:]
        if not self._options.check or kind in self._checked:
            return
        failure = self._compared(step, args, parts, sizes) if len(parts) > 1 else None
        if check.agree(failure, len(parts) > 1, self._device):
            self._checked[kind] = {self._way(step, parts, args)}

    def _way(self, step: str, parts: list[Any], args: tuple[Any, ...]) -> frozenset[Any]:
        return frozenset(route.way for route in self._routes.of(step, parts, args[1:]))

    @property
    def _goes_new_way(self) -> bool:
        """Whether the step that has run went another way than those of its kind that were compared."""
        step = self._step
        ways = self._checked.get((step.name, self.module.training, step.rest[1:]))
        if ways is None or len(step.parts) == 1 or len(ways) >= _MOST_WAYS:
            return False
        return frozenset(route.way for route in step.routes) not in ways

    def _check_way(self) -> None:
        """A rank of the pipeline has seen a new way: all compare, before the step's gradients are put in place."""
        step, failure = self._step, None
        step.kept.before_microbatch()
        self._set_attributes(step.attributes)
        if len(step.parts) > 1:
            failure = self._compared(step.name, (step.batch, *step.rest), step.parts, step.sizes)
        self._step = step
        check.agree(failure, True, self._device, self.group)
        kind = step.name, self.module.training, step.rest[1:]
        self._checked.setdefault(kind, set()).add(frozenset(route.way for route in step.routes))

    def _compared(self, step: str, args: tuple[Any, ...], parts: list[Any], sizes: list[int]) -> Failure | None:
        """What differs between a step over several microbatches and over the whole batch, or fails in one of them."""
        routes = self._routes.of(step, parts, args[1:])
        if norm := check.batch_norm(self.module, {name for route in routes for name in route.called}):
            return Failure(ValueError(norm), 0)
        if written := sorted(name for route in routes for name in route.written if not self._runs_alone(name)):
            return Failure(RuntimeError(_write(step, written[0])), 0)
        with kept_random_states(self._device):
            of_parts = self._tried(step, args, parts, sizes)
            failure = self._step.failure
            of_whole = self._tried(step, args, [args[0]], [sum(sizes)])
            failure = failure or self._step.failure
        if failure is None and (difference := check.compare(step, of_whole, of_parts, len(parts))):
            failure = Failure(ValueError(difference), self.stages.num_stages)
        self._written_alike |= of_parts.written.keys()
        return failure

    def _tried(self, step: str, args: tuple[Any, ...], parts: list[Any], sizes: list[int]) -> check.Tried:
        """What a step returns, logs, keeps and writes to parameters over microbatches, without gradients or randomness.

        Nothing is left of it.
        """
        self._begin(step, args, parts, sizes)
        self._step.alike = True
        written = {name for route in self._step.routes for name in route.written}
        named = self.module.named_parameters()
        parameters = {name: p for name, p in named if name in written and not is_placeholder(p)}
        with undone(self.module, parameters.values()), check.fixed(), self._step.logs.recording(), self._computing():
            with self._holding():
                self._in_order().forward(len(parts))
            self.inner.reshard()
            tried = check.Tried()
            with self._failing(self.stages.num_stages):
                if self._has_last:
                    tried.output, tried.loss = self._step.joined(), self._step.manual_loss
                    tried.kept = self._step.kept.joined(sizes, self._step.weights)
                    tried.counted = self._counted()
                tried.logged = self._step.logs.values()
            tried.left = check.left_in(self.module)
            tried.written = {name: p.detach().clone() for name, p in parameters.items()}
            return tried

    @contextmanager
    def _own_random_streams(self, training: bool) -> Iterator[None]:
        """Draws the step's seed from the data rank's stream, which goes on after it on every stage alike.

        Steps that evaluate leave the stream where it was, as they would in one process without random numbers.
        """
        if training:
            self._step.seed = int(torch.randint(2**31, ()))
        with kept_random_states(self._device):
            if not training:
                self._num_evaluated += 1
                self._step.seed = int(torch.randint(2**31, ())) + self._num_evaluated
            yield

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

    def _scale(self) -> float:
        """What Lightning will multiply the loss with; half precision needs it before the backward."""
        trainer = self.module.trainer
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        return float(scale) / trainer.accumulate_grad_batches

    def _run_schedule(self, num_parts: int, in_order: bool) -> None:
        with self._gradients.aside(self._plain), self._holding():
            if in_order:
                self._in_order().forward_and_backward(num_parts)
            else:
                run_torch_schedule(self._schedule(num_parts), num_parts, self._has_last)

    @property
    def _plain(self) -> list[nn.Parameter]:
        """Parameters whose gradients autograd itself puts in place; fully_shard puts those of what it gathers."""
        if isinstance(self.inner, Sharded):
            return [*self.inner.usage.whole, *self.inner.usage.parts]
        return held(self.module.parameters())

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
        trained = self._step.trained
        if stage not in trained:  # once a step: what is gathered stays the same while it lasts
            named = self.module.named_parameters()
            trained[stage] = [p for name, p in named if stage in self.stages.owners[name] and p.requires_grad]
        return trained[stage]

    def _in_order(self) -> InOrder:
        return InOrder(self._microbatch, self._own, self._rank_of, self._step.wires, self.group, self._device)

    # ------------------------------------------------------------------ a microbatch in a stage

    def _microbatch(self, stage: int, index: int, received: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Runs it; after a failure, zeros: see [Note: a step that fails on one stage]."""
        sent: tuple[Tensor, ...] | None = None
        if self._step.failure is None:
            with self._failing(stage):
                sent = self._passed(stage, index, received)
        return self._zeros(stage, index, received) if sent is None else sent

    def _zeros(self, stage: int, index: int, received: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        wires, points = self._step.wires, self._step.routes[index].points
        link = wires[stage - 1].unpack(points[stage - 1], received)[1] if stage else first_link(self._device)
        if stage == self.stages.num_stages - 1:
            return (ended(link, torch.zeros((), device=self._device)),)
        zeros = [torch.zeros(c.tensor.shape, dtype=c.tensor.dtype, device=self._device) for c in points[stage].crossing]
        return wires[stage].pack(link, zeros)

    def _passed(self, stage: int, index: int, received: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        step = self._step
        passage = step.routes[index].passages[stage]
        if stage:
            found, link = step.wires[stage - 1].unpack(step.routes[index].points[stage - 1], received)
        else:
            found, link = [], first_link(self._device)
        number = 0 if step.alike else index
        seed_microbatch(self._device, step.seed, number)
        step.index = index
        step.logs.begin(index, stage == 0, passage.sees_metrics)

        def enter() -> None:
            seed_microbatch(self._device, step.seed, number, stage)
            step.logs.enter()

        def passing(plain: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
            sent, output = passage.run(self.module, partial(plain, *args), found, enter)
            if passage.leave is None:
                return (self._end(index, output, link),)
            return step.wires[stage].pack(link, sent)

        vars(self.module)["_passing"] = passing
        step.appended.before_microbatch()
        step.kept.before_microbatch()
        self._set_attributes(step.attributes)
        try:
            with step.hide_gradients(self.module):
                return self.inner.run(step.name, step.parts[index], *step.rest)
        finally:
            vars(self.module).pop("_passing", None)
            step.logs.end()
            if stage == self.stages.num_stages - 1:
                step.appended.after_microbatch()
                step.kept.after_microbatch()

    def _set_attributes(self, values: dict[tuple[str, str], Any]) -> None:
        """Numbers that modules keep, as they were before the step, or as the last stage has left them."""
        for (name, attribute), value in values.items():
            own = vars(self.module.get_submodule(name))
            if value is None:
                own.pop(attribute, None)
            else:
                own[attribute] = value

    def _attribute(self, place: tuple[str, str]) -> Any:
        """None where it is not there yet."""
        return vars(self.module.get_submodule(place[0])).get(place[1])

    def _end(self, index: int, output: Any, link: Tensor) -> Tensor:
        """The last stage's: the loss of a microbatch, multiplied with its share of the batch."""
        step = self._step
        step.outputs[index] = detached(output)
        if step.name != "training_step" or not torch.is_grad_enabled():
            return link.reshape(1)
        loss = loss_of(output)
        if step.name == "training_step" and not self.module.automatic_optimization:
            loss = step.losses.get(index)
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
            return ended(link, torch.zeros((), device=self._device))
        share = step.weights[index] / sum(step.weights) * self._applied
        return ended(link, loss.reshape(()) * share)

    # ------------------------------------------------------------------ constants

    def _is_constant(self, name: str) -> bool:
        """Whether the step logs the same Python number for another number of samples; seen in a trace of some."""
        step = self._step
        if (step.name, name) not in self._constants:
            logged = []
            with kept_random_states(self._device):
                for count in (1, 2):
                    part = self._splitter.first(step.batch, count)
                    trace_step(self.skeleton, self.module, step.name, part, step.rest)
                    logged.append(self.skeleton.logged.get(name))
            self._constants[step.name, name] = logged[0] == logged[1]
        return self._constants[step.name, name]

    # ------------------------------------------------------------------ gradients

    def _on_all_ranks(self, training: bool) -> Any:
        """What the step returned, on every rank; its loss with a backward that hands the gradients over.

        Communication over the axis: one all-reduce of 32 bytes with the loss, a size, and the numbers of ranks that
        failed, and that went another way than before; and one broadcast of what else there is to share, see [Note: what
        the last stage made].

        Raises:
            Exception: what a stage met; see [Note: a step that fails on one stage].
        """
        step, loss, rest, payload = self._step, torch.zeros((), device=self._device), None, b""
        lists: dict[Any, list[Any]] = {}
        kept: dict[Any, Any] = {}
        counted: dict[Any, Any] = {}
        with self._failing(self.stages.num_stages):
            if self._has_last:
                rest = output = step.joined()
                if step.manual_loss is not None:
                    loss = step.manual_loss.reshape(()).to(self._device)
                elif training:
                    loss = loss_of(output).detach().reshape(()).to(self._device)
                    named = output if isinstance(output, dict) else {}
                    rest = {k: v for k, v in named.items() if k != "loss" and not _holds_placeholder(v)} or None
                lists = step.appended.joined(step.sizes, step.weights)
                shares = self._options.outputs or step.name == "predict_step"
                kept = marked(step.kept.joined(step.sizes, step.weights))
                counted = self._counted()
                everything = [rest, list(lists.items()), list(kept.items()), list(counted.items())]
                payload = pack(everything) if shares else b""
            if not step.is_manual:
                step.logs.replay()
        # ranks may not know in which dtype the last stage computes it
        flags = [float(len(payload)), float(step.failure is not None), float(self._goes_new_way)]
        header = torch.cat([loss.reshape(1).double(), torch.tensor(flags, dtype=torch.float64, device=self._device)])
        dist.all_reduce(header, group=self.group)
        if header[3] and not header[2]:
            self._check_way()
        if header[2]:
            failure = step.failure
            self._step = Step()
            raise_together(failure, self.group, self._device)
        if size := int(header[1]):
            rest, *items = share(payload, size, self.group, self.stages.last_rank, self._device)
            lists, kept, counted = map(dict, items)
        step.appended.extend(lists)
        step.kept.keep(kept)
        self._set_attributes(counted)
        if not training:
            return rest
        value = header[0].to(loss.dtype if self._has_last else torch.get_default_dtype())
        if value.dtype.itemsize < 4:
            value = value.float()
        handed = HandOver.apply(torch.zeros((), device=self._device, requires_grad=True), self, value)
        if step.is_manual:
            self._by_hand = handed, step.logs
            return rest
        return handed if rest is None else {**rest, "loss": handed}

    def _counted(self) -> dict[tuple[str, str], Any]:
        """Numbers that modules keep, where the last stage has left them otherwise than they were."""
        now = {place: self._attribute(place) for place in self._step.attributes}
        return {place: value for place, value in now.items() if value != self._step.attributes[place]}

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        with super().accumulating(), self.inner.accumulating():
            yield

    def before_backward(self, loss: Tensor) -> Tensor:
        return loss

    def forget_step(self) -> None:
        self._step = Step()
        self._schedules.clear()
        self.inner.forget_step()

    def hand_over(self, scale: Tensor) -> None:
        """Puts the gradients of the last schedule in place; called by the loss's backward."""
        ratio = float(scale) / self._applied
        self._gradients.hand_over(ratio)
        if isinstance(self.inner, Sharded):
            if abs(ratio - 1) > 1e-6:
                raise ValueError(
                    "pp with dp_shard: the loss was scaled between training_step and its backward, by "
                    f"{ratio:.6g}; scale it inside of training_step"
                )
            if self.reduces:
                self.inner.reduce_held()

    @torch.no_grad()
    def after_backward(self) -> None:
        if self.reduces:
            self.inner.after_backward()
            self._gradients.reduce(self._data_group, self.buffers)
            if not self._is_scaled:
                self._show_gradients()

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
            broadcast_tensors(owned, self.group, rank)


def _write(step: str, name: str) -> str:
    return (
        f"pp: {step} changes the parameter {name} in place, which each of its microbatches would do, and for "
        "parameters of this rank's stages only; do so in on_train_batch_end, where all of them are there"
    )


def _stage_step(module: pl.LightningModule, name: str) -> Any:
    """Puts the way from cut to cut around a step of the module, which it returns; inside of what gathers parameters."""
    plain: Any = getattr(module, name, None)
    if plain is None or hasattr(plain, "passes"):
        return None if plain is None else plain.passes

    @wraps(plain)
    def staged(*args: Any) -> Any:
        passing = vars(module).pop("_passing", None)  # a step that calls another one runs it as it is
        return plain(*args) if passing is None else passing(plain, *args)

    staged.passes = plain  # type: ignore[attr-defined]
    vars(module)[name] = staged
    return plain


_MOST_WAYS = 16
"""Of a kind of step, that are compared."""

_GRADIENT_HOOKS = ("on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step")
_LATER_HOOKS = ("on_train_batch_end", "on_before_zero_grad")
"""In which gradients are still there, and few look."""


def _gradients_are_seen(module: pl.LightningModule) -> bool:
    """Whether code of the user's looks at gradients between a backward and the next one's zeros."""
    if not module.automatic_optimization:
        return True
    callbacks: list[Any] = module.trainer.callbacks  # type: ignore[attr-defined]
    own = [callback for callback in callbacks if not type(callback).__module__.startswith("lightning.")]
    if any(is_overridden(hook, module) for hook in _GRADIENT_HOOKS):
        return True
    if any(is_overridden(hook, callback, Callback) for hook in _GRADIENT_HOOKS[:2] for callback in own):
        return True
    return any(GRADIENTS in scan_hook(owner, hook) for owner in (module, *own) for hook in _LATER_HOOKS)


def _holds_placeholder(value: Any) -> bool:
    return any(is_placeholder(leaf) for leaf in deep_leaves(value))
