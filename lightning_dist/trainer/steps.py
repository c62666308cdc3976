"""The steps of a run: from Lightning's call to the layout's runner, and what keeps the ranks together meanwhile."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_dist.collectives import gather_objects
from lightning_dist.control_flow import ControlFlow, Told
from lightning_dist.data import validate_same_batches
from lightning_dist.gathering import UnevenAllGather, WorldCalls, all_gather, validate_even
from lightning_dist.logs import RepeatedBatch, StepLogs, attach_logs, attach_metrics
from lightning_dist.logs.kept import logged_so_far, on_host, restore_logged
from lightning_dist.patches import Patches
from lightning_dist.pytree import map_leaves
from lightning_dist.ranks import LayoutRanks
from lightning_dist.trainer.loaders import Loaders
from lightning_dist.trainer.module_setup import ModuleSetup
from lightning_dist.trainer.resume import Resume
from lightning_dist.tuning import Tuning

_NOTHING = nullcontext()


class Steps:
    """Runs the module's steps over the layout, with what reduces logged values, agrees, and looks at a user's gathers.

    [Note: the way of a batch]
    ``HybridStrategy.training_step`` -> :meth:`run` -> ``runner.run``, which each layout has in one file of
    ``parallel/`` -> the user's ``training_step``.
    """

    def __init__(
        self, ranks: LayoutRanks, setup: ModuleSetup, loaders: Loaders, resume: Resume, tuning: Tuning
    ) -> None:
        self._ranks, self._setup, self._loaders, self._resume, self._tuning = ranks, setup, loaders, resume, tuning
        self._trainer: Any = None
        self._logs: StepLogs | None = None
        self.control_flow: ControlFlow | None = None
        """While a fit runs on several ranks."""
        self.world_calls: WorldCalls | None = None
        """While a run goes on in which several ranks see the same samples."""
        self._compared: set[str] = set()
        """Steps whose first batch was seen to be the same on the ranks that share samples."""

    def attach(self, trainer: pl.Trainer, monitored: set[str], preemption: Told, patches: Patches) -> None:
        """The loops are about to begin; ``monitored`` are names of logged values by which schedulers decide."""
        self._detach()
        self._trainer, ranks, setup, is_even = trainer, self._ranks, self._setup, self._resume.is_even
        names = monitored | _monitored(trainer)
        batches_of, group = self._loaders.batches_of, ranks.logs_group
        hosts = None if group is None else ranks.hosts[1]
        self._logs = attach_logs(trainer, patches, names, group, hosts, batches_of, setup.stage, is_even)
        if trainer.state.fn == TrainerFn.FITTING and ranks.world_size > 1:
            self.control_flow = ControlFlow(trainer, setup.runner, ranks, is_even, preemption)
            self.control_flow.attach(patches)
        module, group = trainer.lightning_module, ranks.data_group
        if ranks.logs_group is not None:
            attach_metrics(module, ranks.logs_group, patches)
        if group is not None and ranks.num_data_ranks > 1 and "all_gather" not in vars(module):
            patches.set(module, "all_gather", UnevenAllGather(module, group, self._counts))
        if ranks.layout is not None and ranks.world_size > ranks.num_data_ranks:
            self.world_calls = WorldCalls(ranks.layout)
            self.world_calls.attach(patches)
        patches.also(self._detach)

    def logged_here(self) -> dict[str, Any]:
        """What the training epoch has logged on this rank."""
        here = logged_so_far(self._trainer)
        has_begun = self._trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return here if has_begun else {**here, "epoch": {}}

    def gather_logged(self, here: dict[str, Any]) -> list[Any]:
        """Of all ranks that log different values, in host memory. One all-gather of objects."""
        own = map_leaves(here, on_host)
        return [own] if self._logs is None else gather_objects(own, self._ranks.logs_group)

    def restore_logged(self, states: list[Any]) -> None:
        """Puts it back in a run that goes on; nothing where it was saved by another number of ranks."""
        group = None if self._logs is None else self._ranks.logs_group
        if len(states) != (1 if group is None else dist.get_world_size(group)):
            return
        keys = restore_logged(self._trainer, states[0 if group is None else dist.get_rank(group)])
        if self._logs is not None:
            self._logs.note_epoch(keys)

    def _counts(self) -> bool:
        """Whether the batch that runs is this rank's own."""
        return self._logs is None or not self._logs.repeats

    def _detach(self) -> None:
        self._logs = self.control_flow = self.world_calls = None
        self._compared.clear()

    def run(self, step: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a step of the module.

        Communication: see the runner's class; the first time that a kind of step runs, a comparison of its batch over
        ``pp`` and ``tp``.
        """
        if step not in self._compared and (mesh := self._ranks.mesh) is not None:
            self._compared.add(step)
            for axis in ("pp", "tp"):
                validate_same_batches(step, args, mesh.root[axis].get_group(), self._ranks.device)
        logs = _NOTHING if self._logs is None else self._logs.of_step()
        calls = _NOTHING if self.world_calls is None else self.world_calls.of_step()
        with self.trial(), logs, calls:
            return self._setup.runner.run(step, *args, **kwargs)

    def predict(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Each rank predicts its own batches, in order: batch i of data rank r is the loader's batch i * n + r."""
        index = self._loaders.index_of_batch(args)
        repeated = None if self._loaders.counts(*index) else RepeatedBatch(self._trainer)
        prediction = self.run("predict_step", args, kwargs)
        if repeated is None:
            return prediction
        repeated.undo()
        return self._loaders.drop_prediction(*index)

    def trial(self) -> AbstractContextManager[None]:
        """Around what a step computes: while a batch size is looked for, ranks agree on whether it fitted."""
        return _NOTHING if self._tuning.fits is None else self._tuning.fits.agreed(self.forget)

    def forget(self) -> None:
        """Drops what is left of a step that an exception ended on all ranks alike."""
        if self._setup.runner is not None:
            self._setup.runner.forget_step()

    def note_place(self, asked: str) -> None:
        """Somebody asks for this rank's place in the world, or its size."""
        if self.world_calls is not None:
            self.world_calls.note_place(asked)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """From the ranks with different samples, unless another group than the world is given. One all-gather.

        Args:
            tensor: of this rank's samples, with the same shape on every rank. Returned is (data ranks, *shape) in the
                order of data ranks; in one process the tensor as it is.
            group: other ranks to gather from.
            sync_grads: differentiable. Each rank's gradient is the sum over the ranks that it was gathered to: under
                the mean that data parallelism takes of gradients, a loss of all samples that every rank computes has
                the gradient of one process.
        """
        group = self._ranks.group_unless(group)
        if self.world_calls is not None:
            self.world_calls.note_gather()
        if group is not None and self._trainer is not None and self._trainer.state.finished:
            validate_even(tensor, group)  # rows that an evaluation left; its own all_gather is gone with it
        return tensor if group is None else all_gather(tensor, group, sync_grads)


def _monitored(trainer: pl.Trainer) -> set[str]:
    """Names of logged values by which callbacks decide, or name files."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    names = {str(getattr(callback, "monitor", None)) for callback in callbacks}
    for callback in callbacks:  # ranks must agree on a file's name
        names |= set(re.findall(r"\{([^}:]+)", str(getattr(callback, "filename", None) or "")))
    return names
