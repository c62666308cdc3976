"""What keeps the ranks of a run together while Lightning's loops go: logged values, decisions, and gathered rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_dist.control_flow import ControlFlow
from lightning_dist.gathering import UnevenAllGather, all_gather, validate_even
from lightning_dist.logs import StepLogs, attach_logs, attach_metrics
from lightning_dist.patches import Patches
from lightning_dist.ranks import LayoutRanks
from lightning_dist.trainer.loaders import Loaders
from lightning_dist.trainer.module_setup import ModuleSetup
from lightning_dist.trainer.resume import Resume
from lightning_dist.world_calls import WorldCalls


class Coordination:
    """Reduces what modules log, agrees on what ranks decide, and looks at a user's own collectives.

    Args:
        ranks: of the run.
        loaders: of the run.
        setup: of the module.
        resume: where the run is in its data.
    """

    def __init__(self, ranks: LayoutRanks, loaders: Loaders, setup: ModuleSetup, resume: Resume) -> None:
        self._ranks, self._loaders, self._setup, self._resume = ranks, loaders, setup, resume
        self._trainer: Any = None
        self._logs: StepLogs | None = None
        self._control_flow: ControlFlow | None = None
        self._world_calls: WorldCalls | None = None
        """Where several ranks see the same samples."""

    def attach(self, trainer: pl.Trainer, monitored: set[str], patches: Patches) -> None:
        """The module and its optimizers have been set up; the loops are about to begin.

        Args:
            trainer: of the run.
            monitored: names of logged values by which schedulers decide.
            patches: of what is set up.
        """
        self._trainer, ranks, setup = trainer, self._ranks, self._setup
        self._logs = self._control_flow = self._world_calls = None
        names = monitored | _monitored(trainer)
        self._logs = attach_logs(
            trainer, patches, names, ranks.logs_group, self._loaders.batches_of, setup.stage, self._resume.is_even
        )
        if trainer.state.fn == TrainerFn.FITTING and ranks.world_size > 1:
            assert setup.runner is not None
            self._control_flow = ControlFlow(trainer, setup.runner, ranks.device, ranks.timeout, self._resume.is_even)
            self._control_flow.attach(patches)
        module, group = trainer.lightning_module, ranks.data_group
        if ranks.logs_group is not None:
            attach_metrics(module, ranks.logs_group, patches)
        if group is not None and ranks.num_data_ranks > 1 and "all_gather" not in vars(module):
            patches.set(module, "all_gather", UnevenAllGather(module, group, self._counts))
        if ranks.layout is not None and ranks.world_size > ranks.num_data_ranks:
            self._world_calls = WorldCalls(ranks.layout)
            self._world_calls.attach(patches)
        patches.also(self._detach)

    def _counts(self) -> bool:
        """Whether the batch that runs is this rank's own."""
        return self._logs is None or not self._logs.repeats

    def _detach(self) -> None:
        self._logs = self._control_flow = self._world_calls = None

    @contextmanager
    def of_step(self) -> Iterator[None]:
        """While a step of the module runs."""
        logs = nullcontext() if self._logs is None else self._logs.of_step()
        calls = nullcontext() if self._world_calls is None else self._world_calls.of_step()
        with logs, calls:
            yield

    def before_batch(self) -> None:
        """A training batch begins."""
        if self._control_flow is not None:
            self._control_flow.before_batch()

    def note_place(self, name: str) -> None:
        """Somebody reads ``global_rank`` or ``world_size``, which count ranks with the same samples."""
        if self._world_calls is not None:
            self._world_calls.note_place(name)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """From the ranks with different samples, unless another group than the world is given. One all-gather.

        ``LightningModule.all_gather`` names the world where its caller names nothing (seen in Lightning 2.6.6), which
        holds every sample once for each rank of ``tp`` and ``pp``.

        Args:
            tensor: of this rank's samples, with the same shape on every rank.
            group: other ranks to gather from.
            sync_grads: differentiable. Each rank's gradient is the sum over the ranks that it was gathered to: under
                the mean that data parallelism takes of gradients, a loss of all samples that every rank computes has
                the gradient of one process.

        Returns:
            (data ranks, *shape) in the order of data ranks; in one process the tensor as it is.
        """
        group = self._ranks.group_unless(group)
        if self._world_calls is not None:
            self._world_calls.note_gather()
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
