"""The parts of a strategy together, and the order in which a run sets them up and leaves them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.plugins import CheckpointIO, Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.compile import to_uncompiled
from torch.optim import Optimizer

from lightning_dist.compat import lightning as private
from lightning_dist.elastic.guard import begin_run, end_run, left_together, note_children
from lightning_dist.module_layout import ModuleOptions
from lightning_dist.parallel.replaced import OF_ENDED_RUNS
from lightning_dist.patches import Patches
from lightning_dist.ranks import LayoutRanks
from lightning_dist.report.throughput import count_samples_once
from lightning_dist.trainer.checkpoints import CheckpointOptions, Checkpoints
from lightning_dist.trainer.global_batch import GlobalBatch
from lightning_dist.trainer.hpc_checkpoints import HpcCheckpoints
from lightning_dist.trainer.loaders import Loaders
from lightning_dist.trainer.module_setup import ModuleSetup
from lightning_dist.trainer.numbers import Numbers
from lightning_dist.trainer.optimization import Optimization
from lightning_dist.trainer.preemption import Preemption
from lightning_dist.trainer.restart import Restart
from lightning_dist.trainer.resume import Resume
from lightning_dist.trainer.snapshots import Snapshots
from lightning_dist.trainer.steps import Steps
from lightning_dist.trainer.survival import SurvivalOptions
from lightning_dist.trainer.watching import Watching
from lightning_dist.tuning import Tuning, validate_tuner
from lightning_dist.validation import validate_trainer, warn_of_axes_across_nodes

_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


class Parts:
    """What a strategy is made of; see the README of this folder."""

    def __init__(
        self,
        ranks: LayoutRanks,
        module_options: ModuleOptions,
        checkpoint_options: CheckpointOptions,
        survival: SurvivalOptions,
    ) -> None:
        self.ranks = ranks
        self.tuning = Tuning(ranks)
        self.batch = GlobalBatch(ranks)
        self.loaders = Loaders(ranks, self.batch)
        self.module_setup = setup = ModuleSetup(ranks, module_options)
        self.resume = Resume(ranks, self.loaders, self.batch, setup.share_buffers)
        self.snapshots = Snapshots(ranks, self.resume, setup, survival.snapshots, self._is_searching)
        self.restart = Restart(self._is_searching, self.snapshots.begin)
        self.checkpoints = Checkpoints(
            ranks, self.resume, self.restart, checkpoint_options, lambda: setup.names_of_parts
        )
        self.numbers = Numbers(ranks, setup, self.resume, survival.checks)
        self.optimization = Optimization(ranks, setup, self.numbers, self.resume.weight_of_batch)
        self.steps = Steps(ranks, setup, self.loaders, self.resume, self.tuning)
        self.watching = Watching(ranks, survival.report_stragglers)
        self.hpc = HpcCheckpoints(ranks, self.resume, self.checkpoints, self.steps)
        self.preemption = Preemption(ranks, self.resume, self.hpc, self.steps, self.tuning, survival.max_time)
        self.is_set_up = False
        """Whether a run has set up its module, and goes on."""
        self._is_in_run = self._failed = False
        self._patches, self._setup_patches = Patches(), Patches()
        """What a run changes, and what its set-up does."""
        self._compiled: tuple[dict[str, Any], pl.LightningModule] | None = None
        """How the user compiled which module whole; see :meth:`take_module`."""

    def _is_searching(self) -> bool:
        """Whether one of Lightning's finders runs, whose steps are none of the fit's."""
        return self.tuning.is_searching

    def take_module(self, module: pl.LightningModule | None, is_new: bool) -> None:
        """Called when Lightning sets the module: takes the steps of ``torch.compile(module)`` off until the set-up.

        Lightning puts them onto the module and refuses them for strategies that are not its own, before it asks those.
        """
        context = private.compiled_steps(module)
        if module is not None and context is not None:
            self._compiled = dict(context), to_uncompiled(module)
        elif is_new:
            self._compiled = None

    def _validate_compiled(self) -> None:
        layout = self.ranks.layout
        if self._compiled is not None and layout is not None and layout.holds_shards:
            raise ValueError(
                f"torch.compile of the whole LightningModule under layout {layout}: a rank holds parts of what it "
                "would compile; pass the module itself, and HybridStrategy(compile=True), which compiles its blocks"
            )

    def _compile_again(self) -> None:
        compiled, self._compiled = self._compiled, None
        if compiled is not None:
            private.compile_steps(compiled[1], _STEPS, compiled[0])

    def validate(self, module: pl.LightningModule, start_method: str, io: CheckpointIO) -> None:
        """A run begins; raises a ValueError, before process groups form, for what can't work under the layout.

        Raises a RuntimeError where other ranks are still in an earlier run.
        """
        ranks, trainer = self.ranks, module.trainer
        self._is_in_run = True
        if ranks.world_size > 1:
            begin_run()
        self._validate_compiled()
        validate_trainer(trainer, ranks.layout, ranks.device)
        self.module_setup.validate(module)
        if trainer.state.fn == TrainerFn.FITTING:
            self.numbers.validate(module)
        if ranks.layout is not None:
            warn_of_axes_across_nodes(ranks.layout, ranks.num_processes, ranks.num_nodes)
        validate_tuner(trainer, start_method)
        self._patches.undo()
        self.preemption.begin(trainer, self._patches)
        self.checkpoints.attach(trainer, io)

    def join(self, module: pl.LightningModule, environment: ClusterEnvironment, launcher: Any) -> None:
        """Forms the process groups; from here on the Trainer's loaders are dealt, and hangs are told."""
        ranks, is_new = self.ranks, not dist.is_initialized()
        ranks.join(environment)
        if is_new and ranks.world_size > 1:
            begin_run()
        note_children(launcher)
        self.watching.begin(module.trainer)
        ranks.form_mesh()
        private.show_mesh(module, None if ranks.mesh is None else ranks.mesh.root)
        self.batch.attach(module.trainer, self._patches)
        self.loaders.attach(module.trainer, self._patches)
        self.resume.attach(module.trainer, self._patches)
        self.restart.attach(module.trainer, self._patches)
        self.hpc.attach(module.trainer, self._patches)

    def building(self, module: pl.LightningModule | None) -> AbstractContextManager[None]:
        """Around ``configure_model``; outside of a run, in ``Trainer.init_module``, a module is built whole."""
        return self.module_setup.deferring(module) if self._is_in_run and module is not None else nullcontext()

    def before_setup(self, precision: Precision) -> None:
        """The module is about to be set up: all hooks have seen the checkpoint."""
        self._setup_patches.undo()
        self.checkpoints.before_setup()
        self.optimization.attach(precision, self._setup_patches)

    def after_setup(self, trainer: pl.Trainer, monitored: set[str], training: bool) -> None:
        """The module and its optimizers have been set up; the loops are about to begin."""
        if training:
            self.checkpoints.callback_saves.attach(trainer, self._setup_patches)
        self.preemption.attach(trainer, self._setup_patches)
        self.steps.attach(trainer, monitored, self.preemption, self._setup_patches)
        self._validate_compiled()
        self._compile_again()
        if training:
            self.snapshots.attach(trainer, self._setup_patches)
            self.numbers.attach(trainer, self._is_searching, self._setup_patches)
        else:
            self.ranks.part_random_streams()
        count_samples_once(trainer, self.ranks.num_data_ranks, self._setup_patches)
        self.is_set_up = True
        self.watching.loops_begin()
        self.module_setup.report(trainer.lightning_module).show(trainer)

    def on_train_start(self) -> None:
        """All is restored, and hooks have run; the first batch is about to be asked for."""
        # until here all data ranks draw the same random numbers: hooks may have initialised parameters
        self.ranks.part_random_streams()
        self.resume.on_train_start()
        self.snapshots.on_train_start()
        self.restart.on_train_start()
        self.checkpoints.on_train_start()
        self.tuning.watch_losses()

    def remove_checkpoint(self, path: private.Path) -> None:
        """Removes a checkpoint; that of one of Lightning's finders ends its search."""
        ends = self.tuning.ends_with(path)
        self.checkpoints.remove(self.tuning.path(path) if ends else path)
        if ends:
            self.resume.last_step = self.tuning.end()

    def leave(self, optimizers: list[Optimizer]) -> None:
        """The run ends, perhaps by an exception and before it was set up."""
        self._is_in_run = self.is_set_up = False
        failed, self._failed = self._failed, False
        self.snapshots.leave(failed)
        self._compile_again()
        if self.tuning.is_searching:
            self.resume.last_step = self.tuning.leave()
        self.checkpoints.detach()
        self._setup_patches.undo()
        self._patches.undo()
        self.module_setup.reshard()
        if self.module_setup.gives_back and (not failed or not self.ranks.holds_shards or left_together()):
            self.module_setup.give_back()
        OF_ENDED_RUNS.update(optimizers)

    def end(self, exception: BaseException | None = None, launcher: Any = None) -> None:
        """This rank leaves the run, as the others hear; see [Note: who may go on]."""
        self.watching.end(failed=exception is not None)
        if self.ranks.world_size > 1:
            end_run(self.ranks.groups, exception, launcher)
        if exception is not None:
            self._failed = True
            self.steps.forget()
            self.checkpoints.end_saves(exception)
