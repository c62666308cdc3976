"""Steps with bad numbers: not finite, or far above those before; all ranks do the same about one.

[Note: who sees a bad number]
A gradient that is not finite may be so on one rank alone: in a shard, in a stage, or in a copy that a chip got wrong
after the average. So all ranks add up their shares of the squared norm, and of the loss: what is not finite in one is
not in the sum, and each rank reads the same numbers and does the same. That is done where the optimizer would
step, when hooks and clipping have run; what it finds bad is not stepped with, and so no parameter and no state changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from types import MethodType
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dist.collectives import gather_objects
from lightning_dist.divided.copies import copies_of
from lightning_dist.gradients import share_of_powers
from lightning_dist.numbers import BadStep, NumberChecks
from lightning_dist.numbers.good_state import GoodStates, StateCopy
from lightning_dist.numbers.spikes import SpikeWatch
from lightning_dist.patches import Patches
from lightning_dist.ranks import LayoutRanks
from lightning_dist.trainer.module_setup import ModuleSetup
from lightning_dist.trainer.replay import Replay
from lightning_dist.trainer.resume import Resume

MOST_REWINDS = 3
"""In a row, without a normal step between: then it is no spike of single batches, but where the training is."""


@dataclass(frozen=True)
class Place:
    """Where a training is: optimizer steps, the epoch, and the batch of it."""

    step: int
    epoch: int
    batch: int


class Numbers:
    """Looks at what each step computes, as the user asks; see [Note: who sees a bad number].

    Communication: none, and nothing else is done, where nothing is asked for. With ``on_nonfinite`` or ``on_spike``,
    per optimizer step one all-reduce of 24 bytes over the world, which the host waits for; where a step is bad, a
    gather of its samples' indices. See :class:`Replay` for ``replay_every_n_steps``.
    """

    def __init__(self, ranks: LayoutRanks, setup: ModuleSetup, resume: Resume, checks: NumberChecks) -> None:
        self._ranks, self._setup, self._resume, self.checks = ranks, setup, resume, checks
        self.bad_steps: list[BadStep] = []
        """Of the last fit, in their order."""
        every = checks.replay_every_n_steps
        self._replay = None if every is None else Replay(ranks, setup, every)
        self._trainer: Any = None
        self._loss: Tensor | None = None
        """The sum of losses since the last step."""
        self._norm: Tensor | None = None
        """That of its gradients before they were clipped."""
        self._first_batch = 0
        """Of those whose gradients the next step has."""
        self._watches: dict[int, SpikeWatch] = {}
        self._good: GoodStates | None = None
        self._num_rewinds = 0
        """In a row."""
        self._is_off: Callable[[], bool] = bool
        """Whether a search of a finder runs, whose steps are none of a training."""

    def validate(self, module: pl.LightningModule) -> None:
        """A fit begins; raises a ValueError, before process groups form, for what can't work."""
        self.bad_steps = []
        self.checks.validate(module)

    def attach(self, trainer: pl.Trainer, is_off: Callable[[], bool], patches: Patches) -> None:
        """The module and its optimizers have been set up; until an undo they step by way of this."""
        self._trainer, self._is_off = trainer, is_off
        self._loss, self._norm, self._first_batch, self._watches = None, None, 0, {}
        self._good, self._num_rewinds = None, 0
        if self._replay is not None:
            self._replay.attach(trainer)
        for optimizer in trainer.optimizers:
            self.checks.validate_optimizer(optimizer)
            if self.checks.look_at_steps:
                self._stand_before(optimizer, patches)
        if self.checks.rewinds:
            self._good = self._good_states(trainer)

    def _good_states(self, trainer: pl.Trainer) -> GoodStates:
        assert self.checks.spikes is not None
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        module = trainer.lightning_module
        averaging = [c for c in callbacks if any(True for _ in copies_of(module, [c]))]
        modules = [module, *(v for c in averaging for v in vars(c).values() if isinstance(v, nn.Module))]
        schedulers = (config.scheduler for config in trainer.lr_scheduler_configs)
        others = [*schedulers, trainer.precision_plugin, *map(_Counts, averaging)]
        take = partial(StateCopy, modules, trainer.optimizers, others, self._ranks.device)
        return GoodStates(take, self.checks.spikes.every_n_steps)

    def _stand_before(self, optimizer: Optimizer, patches: Patches) -> None:
        """Lets an optimizer step only if its numbers are good: its closure, which computes them, runs before."""
        original: Any = optimizer.step

        @wraps(original)
        def step(_: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
                kwargs["closure"] = _once(optimizer, loss)
            if not self._may_step(optimizer):
                return loss
            result = original(**kwargs)
            self._after_update()
            return result

        patches.set(optimizer, "step", MethodType(step, optimizer))

    # --- what a step is told of ---

    def before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """``training_step`` is about to run."""
        if not (self.checks.look_at_steps or self._replay) or self._is_off():
            return
        batch_idx = self._trainer.fit_loop.batch_idx
        is_first = batch_idx % self._trainer.accumulate_grad_batches == 0
        if is_first:  # a scaler may have kept the step before from its optimizer
            self._loss, self._norm, self._first_batch = None, None, batch_idx
        if self._replay is not None:
            self._replay.before_step(is_first, args, kwargs)

    def note_loss(self, loss: Tensor) -> None:
        """A backward pass is about to start from it."""
        if self.checks.look_at_steps:
            value = loss.detach().double() if loss.device.type != "mps" else loss.detach()
            self._loss = value if self._loss is None else self._loss + value
        if self._replay is not None:
            self._replay.note_loss(loss)

    def note_norm(self, norm: Tensor) -> None:
        """That of the gradients which are being clipped."""
        self._norm = norm

    def after_backward(self) -> None:
        """The gradients of a backward pass are finished."""
        if self._replay is not None:
            self._replay.after_backward()

    # --- what is done about it ---

    def _may_step(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer may take the gradients that are there; the same on all ranks."""
        if self._is_off():
            return True
        checks = self.checks
        loss, norm, is_finite = self._measured(optimizer)
        if not is_finite and checks.on_nonfinite != "train":
            bad = self._bad("nonfinite", loss, norm, "skipped")
            if checks.on_nonfinite == "raise":
                raise RuntimeError(f"numbers that are not finite in {bad}; on_nonfinite='skip' leaves such steps out")
            self._tell(bad, "numbers that are not finite; no rank takes the step")
            return False
        if checks.spikes is None:
            return True
        watch = self._watches.setdefault(id(optimizer), SpikeWatch(checks.spikes))
        if is_finite and not watch.is_spike(loss, norm):
            self._num_rewinds = 0
            watch.add(loss, norm)
            if self._good is not None:
                self._good.confirm()
            return True
        return self._heed(watch, loss, norm, is_finite)

    def _measured(self, optimizer: Optimizer) -> tuple[float | None, float, bool]:
        """Loss and gradient norm over all ranks, and whether all is finite. One all-reduce of 24 bytes over the world,
        and one wait of the host.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        share = share_of_powers(parameters)[0]
        others = [share.new_zeros(()) if one is None else one.to(share) for one in (self._loss, self._norm)]
        numbers = torch.stack([share, *(one / self._ranks.world_size for one in others)])
        if dist.is_initialized():
            dist.all_reduce(numbers)
        squares, loss, before_clipping = numbers.tolist()
        is_finite = all(map(math.isfinite, (squares, loss, before_clipping)))
        norm = math.sqrt(squares) if self._norm is None else before_clipping
        has_loss = self._loss is not None
        self._loss = self._norm = None
        return loss if has_loss else None, norm, is_finite

    def _heed(self, watch: SpikeWatch, loss: float | None, norm: float, is_finite: bool) -> bool:
        """Whether to train on a spike all the same."""
        if self._good is None or self._num_rewinds == MOST_REWINDS:
            bad = self._bad("spike", loss, norm, "trained")
            if self._good is not None and not is_finite:
                raise RuntimeError(f"numbers that are not finite, after {MOST_REWINDS} rewinds in a row, in {bad}")
            if self._good is not None:
                watch.forget()
            if is_finite:
                watch.add(loss, norm)
            self._num_rewinds = 0
            still = f", after {MOST_REWINDS} rewinds in a row: the median begins anew" if self._good else ""
            self._tell(bad, f"a spike{still}; it is trained on")
            return True
        place = self._here
        self._setup.reshard()
        good = self._good.go_back()
        if good is None:
            self._tell(self._bad("spike", loss, norm, "skipped"), "a spike, before there is a state to go back to")
            return False
        self._num_rewinds += 1
        bad = self._bad("spike", loss, norm, "rewound", good.step)
        self._count_from(good)
        since = f"batch {good.batch} of epoch {good.epoch} to batch {place.batch} of epoch {place.epoch}"
        self._tell(bad, f"a spike; the training goes on from step {good.step}, without the batches after {since}")
        return False

    @property
    def _here(self) -> Place:
        trainer = self._trainer
        return Place(trainer.global_step, trainer.current_epoch, trainer.fit_loop.batch_idx)

    def _after_update(self) -> None:
        if self._good is not None and not self._is_off():
            here = self._here
            self._good.after_update(Place(here.step + 1, here.epoch, here.batch))  # Lightning counts it next

    def _count_from(self, good: Place) -> None:
        """Lightning's count of optimizer steps, to which it is about to add the one that ends."""
        progress = self._trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
        taken_back = progress.total.completed + 1 - good.step
        for part in (progress.total, progress.current):
            part.completed = max(0, part.completed - taken_back)
            part.ready = part.completed + 1

    def _bad(
        self,
        what: Literal["nonfinite", "spike"],
        loss: float | None,
        norm: float,
        did: Literal["trained", "skipped", "rewound"],
        back_to: int | None = None,
    ) -> BadStep:
        """Notes a step. One gather of the indices of its samples over the world."""
        here = self._here
        batches = min(self._first_batch, here.batch), here.batch
        of_ranks = dict(gather_objects((self._ranks.data_rank, self._resume.samples_of(*batches))))
        bad = BadStep(what, here.step, here.epoch, batches, loss, norm, dict(sorted(of_ranks.items())), did, back_to)
        self.bad_steps.append(bad)
        return bad

    def _tell(self, bad: BadStep, what: str) -> None:
        rank_zero_warn(f"{bad}: {what}")


class _Counts:
    """The numbers among the attributes of an object: when a callback that averages has done so last, say."""

    def __init__(self, owner: Any) -> None:
        self._own = vars(owner)

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in self._own.items() if type(value) in (bool, int, float)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._own.update(state)


def _once(optimizer: Optimizer, loss: Any) -> Callable[[], Any]:
    """A closure that has run; an optimizer that evaluates it again would do so on changed parameters."""
    calls = iter((True,))

    def closure() -> Any:
        if next(calls, None) is None:
            raise RuntimeError(
                f"{type(optimizer).__name__} evaluates its closure several times in a step, and on_nonfinite and "
                "on_spike look at a step once; leave them out, or use another optimizer"
            )
        return loss

    return closure
