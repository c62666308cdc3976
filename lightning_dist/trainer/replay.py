"""Wrong chips: a training step that is computed twice gives the same, bit for bit.

[Note: a step is computed again]
Every n steps what a step begins from is kept: its batches, the random states, and what the step changes in its module
(buffers, attributes and what is in them, metrics, generators). When its backward has finished, before hooks see the
gradients, all of that is put back, the same is computed once more without logging, and then everything is as after
the first time. Kernels that add in any order give other bits each time: where torch was not told to be deterministic,
and the device is no CPU, numbers are compared within :data:`~lightning_dist.numbers.kept_step.ROUNDING`.

Beside that, ranks that hold the same parts of parameters compare digests of these, and of the finished gradients.
"""

from __future__ import annotations

import copy
import socket
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_dist.collectives import gather_objects
from lightning_dist.compat import lightning as private
from lightning_dist.compat.torch import DisableTorchFunctionSubclass
from lightning_dist.gradients import local_gradients
from lightning_dist.layout import MESH_AXES
from lightning_dist.numbers.digests import (
    COMPARED_AXES,
    LocalGradients,
    bits_of,
    digest,
    digests_by_axis,
    leaves_of,
    norm_of,
)
from lightning_dist.numbers.kept_step import Before, Microstep, is_close, undo_of_step
from lightning_dist.numbers.verdict import Row, judge, told
from lightning_dist.patches import Patches
from lightning_dist.placeholder import held
from lightning_dist.random_states import RandomStates
from lightning_dist.ranks import LayoutRanks
from lightning_dist.trainer.module_setup import ModuleSetup


class Replay:
    """Computes every n-th step twice, and ends the run on all ranks where it gives other numbers.

    Communication, in those steps: what the step itself communicates once more, and one gather of some hundred bytes per
    rank over the world, which the host waits for. Memory: a copy of the step's batches and of the module's buffers;
    where kernels are not deterministic, of the gradients.
    """

    def __init__(self, ranks: LayoutRanks, setup: ModuleSetup, every: int) -> None:
        self._ranks, self._setup, self._every = ranks, setup, every
        self._trainer: Any = None
        self._microsteps: list[Microstep] = []
        self._before: Before | None = None
        self._is_replaying = self._has_run = False

    def attach(self, trainer: pl.Trainer) -> None:
        """A fit begins. Its first step is not computed again: DDP then orders anew what it adds up over the ranks."""
        self._trainer, self._is_replaying, self._has_run = trainer, False, False
        self.forget()

    def forget(self) -> None:
        """Drops a step that comes to no end."""
        if self._before is not None:
            self._before.own.end()
        self._microsteps, self._before = [], None

    @property
    def _is_exact(self) -> bool:
        return self._ranks.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()

    def before_step(self, is_first: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """``training_step`` is about to run; ``is_first`` where gradients begin from nothing."""
        if is_first:
            self.forget()
            if self._has_run and (self._trainer.global_step + 1) % self._every == 0:
                self._before = self._kept()
            self._has_run = True
        if self._before is not None:
            random = RandomStates.now(self._ranks.device)
            batch = copy.deepcopy((args, kwargs))
            self._microsteps.append(Microstep(*batch, random, self._setup.runner.weight))

    def _kept(self) -> Before:
        self._setup.reshard()
        optimizers = self._trainer.optimizers
        with DisableTorchFunctionSubclass():
            zeroed = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
            others = [p for p in held(self._module.parameters()) if id(p) not in zeroed and p.grad is not None]
            gradients = [(p, p.grad.detach().clone()) for p in others]
        own = LocalGradients(leaves_of(self._module), bits_of if self._is_exact else norm_of)
        return Before(undo_of_step(self._module), gradients, own)

    @property
    def _module(self) -> Any:
        return self._trainer.lightning_module

    def note_loss(self, loss: Tensor) -> None:
        """A backward pass is about to start from it."""
        if self._before is not None and not self._is_replaying:
            self._before.loss = loss.detach()

    def after_backward(self) -> None:
        """The gradients of a backward pass are finished; raises a RuntimeError on all ranks where a rank is wrong."""
        if self._before is None or self._is_replaying or private.accumulates(self._trainer):
            return
        before, self._before, self._is_replaying = self._before, None, True
        try:
            row = self._compared(before)
        finally:
            self._microsteps, self._is_replaying = [], False
        rows, hosts = zip(*gather_objects((row, socket.gethostname())), strict=True)
        verdict = judge(rows, self._groups())
        if verdict is not None:
            raise RuntimeError(
                f"{told(verdict, self._trainer.global_step, hosts)}. No optimizer has taken it: look for errors of "
                "that device and its memory, and go on from a checkpoint without it. (A step that draws from other "
                "generators than torch's, numpy's and Python's, or keeps state outside of its module, differs too.)"
            )

    def _compared(self, before: Before) -> Row:
        """The step is computed again; its second gradients are left in place of the first, and are the same if all is
        well.
        """
        is_exact, first_own = self._is_exact, before.own.end()
        first = self._finished()
        kept = [] if is_exact else [gradient.clone() for gradient in self._gradients()]
        own = before.own.again()
        loss = self._computed_again(before)
        second_own, second = own.end(), self._finished()
        assert before.loss is not None
        if is_exact:
            differs = bits_of(loss).item() != bits_of(before.loss).item(), bool(first_own != second_own)
            final = bool(first != second)
        else:
            differs = not is_close(loss, before.loss), not is_close(second_own, first_own)
            final = not all(map(is_close, self._gradients(), kept))
        parameters = digests_by_axis(self._parameters())
        gradients = digests_by_axis(self._gradients())
        return Row(*differs, final, _numbers(parameters), _numbers(gradients))

    def _parameters(self) -> list[Any]:
        with DisableTorchFunctionSubclass():
            return [p.detach() for p in held(self._module.parameters())]

    def _gradients(self) -> list[Tensor]:
        with DisableTorchFunctionSubclass():
            return [p.grad for p in held(self._module.parameters()) if p.grad is not None]

    def _finished(self) -> Tensor:
        return digest(local_gradients(self._module.parameters())).cpu()

    def _computed_again(self, before: Before) -> Tensor:
        """Puts back what the step began from, computes it, and puts back what was there. Returns the last loss."""
        self._setup.reshard()
        undo, random, loss = undo_of_step(self._module), RandomStates.now(self._ranks.device), None
        before.undo()
        with DisableTorchFunctionSubclass():
            for parameter in held(self._module.parameters()):
                parameter.grad = None
            for parameter, gradient in before.gradients:
                parameter.grad = gradient
        with Patches() as patches:
            for part in self._module.modules():
                if isinstance(part, pl.LightningModule):
                    patches.set(part, "log", _nothing)
                    patches.set(part, "log_dict", _nothing)
            for microstep in self._microsteps:
                is_last = microstep is self._microsteps[-1]
                with nullcontext() if is_last else self._setup.runner.accumulating():
                    loss = self._microstep(microstep)
        self._setup.reshard()
        undo()
        random.restore(self._ranks.device)
        assert loss is not None
        return loss

    def _microstep(self, microstep: Microstep) -> Tensor:
        """As the loop, the strategy and the precision plugin do, without hooks."""
        runner, precision = self._setup.runner, self._trainer.precision_plugin
        microstep.random.restore(self._ranks.device)
        runner.weight = microstep.weight
        with precision.train_step_context():
            output = runner.run("training_step", *microstep.args, **microstep.kwargs)
        loss = (output if isinstance(output, Tensor) else output["loss"]) / self._trainer.accumulate_grad_batches
        seen = loss.detach()
        loss = runner.before_backward(runner.weighted(loss))
        scaler = getattr(precision, "scaler", None)
        precision.backward(loss if scaler is None else scaler.scale(loss), self._module, self._trainer.optimizers[0])
        runner.after_backward()
        return seen

    def _groups(self) -> list[tuple[str, list[list[int]]]]:
        """The ranks along each axis; without ``tp`` where its ranks, which reduce nothing that they hold alike, may
        round differently.
        """
        mesh = self._ranks.mesh
        if mesh is None:
            return []
        ranks = mesh.root.mesh
        along = {axis: ranks.movedim(MESH_AXES.index(axis), -1).flatten(0, -2).tolist() for axis in COMPARED_AXES}
        return [(axis, groups) for axis, groups in along.items() if axis != "tp" or self._is_exact]


def _nothing(*_: Any, **__: Any) -> None:
    """In place of ``log``."""


def _numbers(digests: list[Tensor]) -> tuple[int, ...]:
    return tuple(int(one) for one in digests)
