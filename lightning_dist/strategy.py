"""HybridStrategy: Lightning's hooks; each calls the part where the work is done."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.plugins import CheckpointIO, Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.strategy import TBroadcast
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dist import collectives
from lightning_dist.checkpoint.lazy_tensors import read_kept_tensors
from lightning_dist.compat import lightning as private
from lightning_dist.layout import Layout
from lightning_dist.module_layout import ModuleOptions, ShardUnits, compile_options, one_of
from lightning_dist.numbers import BadStep, NumberChecks, OnNonfinite, OnSpike
from lightning_dist.parallel import Checkpointing
from lightning_dist.parallel.pipeline import BatchSplit, PipelineOptions
from lightning_dist.parallel.placing import to_device
from lightning_dist.plans.tensor import Styles, TensorOptions
from lightning_dist.ranks import LayoutRanks, shown_of_ranks
from lightning_dist.report import LayoutReport
from lightning_dist.trainer.checkpoints import CheckpointOptions, Format
from lightning_dist.trainer.parts import Parts
from lightning_dist.trainer.preemption import MaxTime
from lightning_dist.trainer.snapshots import SnapshotOptions
from lightning_dist.trainer.survival import SurvivalOptions


@private.told_of_module
class HybridStrategy(ParallelStrategy):
    """Trains any LightningModule, unchanged, over a layout of data and model parallelism.

    Args:
        layout: degrees of the axes: a :class:`~lightning_dist.Layout`, a mapping, a string such as
            ``"dp_replicate=2,dp_shard=4"``, or ``"auto"``: replicate what fits on a device, shard what doesn't.
        fallback_layouts: where a run goes on with another number of ranks than it began with, and ``layout`` does not
            fit those: layouts to try, in their order. Default: the data axes change, and ``pp`` and ``tp`` stay.
        shard_units: the modules to shard one by one, by name (with ``*``), class name, class, or a function of name and
            module. Default: the repeated blocks of the network.
        reshard_after_forward: under ``dp_shard``, free what was gathered for a block's forward, and gather it again for
            its backward (ZeRO-3). False keeps it until the backward has run (ZeRO-2): fewer bytes sent, more memory.
            Under ``pp``, ``pipeline_reshard`` says it of steps in training.
        cpu_offload: under ``dp_shard``, keep parameters, gradients and optimizer states in the memory of the host,
            where the optimizer steps; a GPU has what is gathered. Processes then also talk by gloo.
        max_unit_parameters: under ``dp_shard``, a block of more elements is gathered in parts: its largest layers on
            their own, until none has more, but for single layers. Default: whole blocks.
        prefetch_units: under ``dp_shard``, how many units are gathered ahead of the one that runs.
        tensor_plan: what ``tp`` divides: ``"colwise"`` or ``"rowwise"`` by name of layer (with ``*``), or a function of
            name and module. Default: attention and feed-forward layers, found by what they are made of, and what a
            transformers model declares.
        sequence_parallel: under ``tp``, between the blocks of a network each rank holds its part of the positions.
        loss_parallel: under ``tp``, logits stay divided by vocabulary until something other than ``cross_entropy``
            looks at them. Default: they are gathered at once.
        pipeline_schedule: under ``pp``: ``"GPipe"``, ``"1F1B"``, ``"Interleaved1F1B"``, ``"LoopedBFS"``,
            ``"InterleavedZeroBubble"``, ``"ZBVZeroBubble"`` or ``"DualPipeV"``.
        num_microbatches: into how many a batch is split under ``pp``. Default: four per rank of the axis, or fewer, so
            that each has two samples at least where the batch has two for each rank.
        pipeline_cuts: names of the modules after which ``pp`` cuts the network. Default: those that balance the stages.
        pipeline_reshard: under ``pp`` with ``dp_shard``, gather parameters for each microbatch. Default: once a step.
        pipeline_check: under ``pp``, the first time that a kind of step runs, compare what it does over microbatches
            with what it does over the whole batch; another result is an error.
        pipeline_outputs: under ``pp``, send what a step returns beside its loss, appends to lists of the module and
            keeps in its attributes, from the last stage to every rank of the axis. Predictions are sent all the same.
        batch_split: where a batch has its samples, under ``pp``: a tree like the batch, or like the upper part of it,
            of the dim for tensors, ``"each"`` for a list of one item a sample, None for what every microbatch gets as
            it is; or a function of a batch and a number of parts that returns the parts. Default: the first dim of all
            tensors and arrays that have the size there that most have, and lists of as many items.
        microbatch_weight: under ``pp``, a function of a microbatch that gives of how many its loss is the mean: labels
            that are not ignored, say. Default: samples.
        activation_checkpointing: ``"full"``, blocks keep only inputs and outputs for backward, and compute the rest
            again; ``"selective"``, they also keep the results of matrix products, convolutions and attention.
        compile: True, or the keyword arguments of ``torch.compile``: compiles the blocks one by one.
        checkpoint_format: ``"single"``, one file as Lightning writes it; ``"sharded"``, a directory to which every rank
            writes what it holds; ``"auto"``, sharded where parameters are, but for a user's ``CheckpointIO``.
        async_save: write checkpoints while the training goes on; it stops for the copy to host memory only, which takes
            as much of that as the rank's part of the checkpoint (of a single file, rank 0 takes the whole).
        pretrained: weights that a fit begins from: of torch, safetensors, transformers, Lightning or this strategy. The
            names may lack what the module puts before them; ``strict_loading = False`` allows missing and others.
        snapshot_every_n_steps: after so many optimizer steps, copy what each rank holds of a checkpoint to memory that
            outlives it, from which ranks that are started again go on; nothing where nobody would start them.
        max_time: of one start of a run, in the forms of Lightning's ``Timer``, after which it is preempted as by
            SIGTERM, to be started again. ``Trainer(max_time=...)`` ends a training for good.
        report_stragglers: log, on rank 0, a rank that is slower than those that do the same work, or whose loader is.
        on_nonfinite: what is done with a step whose loss, or gradient norm, is not finite on any rank: ``"train"``, as
            one process of Lightning does; ``"skip"``, no rank takes it, and all counts go on; ``"raise"``.
        on_spike: what is done with one whose loss or gradient norm is far above those before: ``"ignore"``,
            ``"report"``, or ``"rewind"`` to the last good state; or :class:`~lightning_dist.Spikes`.
        replay_every_n_steps: compute every n-th step twice, and end the run with the name of a rank that differs.
        start_method: how Lightning starts other processes: ``"popen"``, ``"spawn"``, ``"fork"`` or ``"forkserver"``.
        process_group_backend, timeout: of torch.distributed; by default those of the device and of torch. All ranks end
            where one waits as long as the timeout, with the name of that for which it does.
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin: the Trainer sets them.

    A layout that does not fit the number of processes is a ValueError when the Trainer is made.

    What is communicated: see the runners in :mod:`lightning_dist.parallel`,
    :func:`~lightning_dist.gradients.global_norm` and :class:`~lightning_dist.logs.StepLogs`.
    """

    strategy_name = "hybrid"
    # Optional in Lightning's class, and there whenever a run calls
    lightning_module: Any
    accelerator: Any
    cluster_environment: Any
    parallel_devices: Any

    def __init__(
        self,
        layout: Layout | Mapping[str, int] | str = "auto",
        *,
        fallback_layouts: Iterable[Layout | Mapping[str, int] | str] = (),
        shard_units: ShardUnits | None = None,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        max_unit_parameters: int | None = None,
        prefetch_units: int = 1,
        tensor_plan: Styles | None = None,
        sequence_parallel: bool = False,
        loss_parallel: bool = False,
        pipeline_schedule: str = "1F1B",
        num_microbatches: int | None = None,
        pipeline_cuts: Iterable[str] | None = None,
        pipeline_reshard: bool = False,
        pipeline_check: bool = True,
        pipeline_outputs: bool = True,
        batch_split: BatchSplit | None = None,
        microbatch_weight: Callable[[Any], Any] | None = None,
        activation_checkpointing: Checkpointing = "none",
        compile: bool | Mapping[str, Any] = False,
        checkpoint_format: Format = "auto",
        async_save: bool = False,
        pretrained: str | Path | None = None,
        snapshot_every_n_steps: int | None = None,
        max_time: MaxTime = None,
        report_stragglers: bool = True,
        on_nonfinite: OnNonfinite = "train",
        on_spike: OnSpike = "ignore",
        replay_every_n_steps: int | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
        accelerator: pl.accelerators.Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin)
        self.start_method = one_of("start_method", start_method, "popen", "spawn", "fork", "forkserver")
        self.num_nodes = 1
        cuts: Any = pipeline_cuts if pipeline_cuts is None or isinstance(pipeline_cuts, str) else list(pipeline_cuts)
        stages = (pipeline_schedule, num_microbatches, cuts, pipeline_reshard)
        pipeline = PipelineOptions(*stages, batch_split, microbatch_weight, pipeline_check, pipeline_outputs)
        tensor = TensorOptions(tensor_plan, sequence_parallel, loss_parallel)
        blocks = shard_units, tensor, activation_checkpointing, compile_options(compile), pipeline
        sharding = reshard_after_forward, cpu_offload, max_unit_parameters, prefetch_units
        self._module_options = ModuleOptions(*blocks, *sharding)
        chosen = one_of("checkpoint_format", checkpoint_format, "auto", "single", "sharded")
        self.checkpoint_options = CheckpointOptions(chosen, async_save, pretrained)
        self._survival = SurvivalOptions(
            SnapshotOptions(snapshot_every_n_steps),
            NumberChecks.of(on_nonfinite, on_spike, replay_every_n_steps),
            bool(one_of("report_stragglers", report_stragglers, True, False)),
            max_time,
        )
        fallbacks = Layout.parse_all(fallback_layouts)
        self.ranks = LayoutRanks(Layout.parse(layout), process_group_backend, timeout, cpu_offload, fallbacks)
        self.parts = self._new_parts()

    def _new_parts(self) -> Parts:
        return Parts(self.ranks, self._module_options, self.checkpoint_options, self._survival)

    def __getstate__(self) -> dict[str, Any]:
        """For copies, and for what is sent elsewhere: without what belongs to the processes of a run."""
        return {name: value for name, value in super().__getstate__().items() if name != "parts"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.parts = self._new_parts()

    def __repr__(self) -> str:
        """What Fabric shows when it is given one."""
        return f"<{type(self).__name__}, for a Trainer; for Fabric there is HybridFabricStrategy>"

    layout, mesh, num_data_ranks, num_processes, data_rank, data_group = shown_of_ranks

    @property
    def bad_steps(self) -> list[BadStep]:
        """Steps of the last fit whose numbers were bad; the same on every rank. See ``on_nonfinite``, ``on_spike``."""
        return self.parts.numbers.bad_steps

    @property
    def gradient_norm(self) -> Tensor | None:
        """Norm of the gradients before the last clipping by norm; the same on every rank."""
        return self.parts.optimization.gradient_norm

    def explain(self, module: pl.LightningModule, num_ranks: int, batch: Any = None) -> LayoutReport:
        """What a fit would do to a module, see :func:`~lightning_dist.explain.plan_report`; raises as it would."""
        return self.parts.module_setup.explain(module, num_ranks, batch)

    @property
    def is_distributed(self) -> bool:
        """Whether several ranks run together now; Lightning asks, of strategies not its own, for logs and finders."""
        return self.parts.is_set_up and self.world_size > 1

    @property
    @override
    def root_device(self) -> torch.device:
        return self.parallel_devices[self.local_rank]

    @property
    @override
    def global_rank(self) -> int:
        self.parts.steps.note_place("global_rank")
        return super().global_rank

    @property
    @override
    def world_size(self) -> int:
        self.parts.steps.note_place("world_size")
        return super().world_size

    def set_world_ranks(self) -> None:
        """Called by the Trainer as soon as devices and nodes are known: the layout is checked here."""
        self.ranks.place(self.cluster_environment, self.parallel_devices, self.num_nodes)
        self.num_nodes = self.ranks.num_nodes
        if self.ranks.layout is not None:
            self._module_options.shards.validate(self.ranks.layout)
        if not self.cluster_environment.creates_processes_externally and self.ranks.world_size > 1:
            private.set_launcher(self, self.start_method)

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.num_data_ranks, "rank": self.data_rank}

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: dist.ReduceOp | str | None = "mean") -> Any:
        return self.ranks.reduce(tensor, group, reduce_op)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return collectives.reduce_decision(decision, all, self.root_device)

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        return self.parts.steps.all_gather(tensor, group, sync_grads)

    @override
    def barrier(self, name: str | None = None) -> None:
        if name == "run-stage":  # all that Lightning restores has been restored (seen in 2.6.6)
            read_kept_tensors()
        self.parts.tuning.raise_if_broken()
        self.parts.preemption.at_barrier(name)
        if name != "Trainer.save_checkpoint" or not self.checkpoint_options.in_background:  # else there is none yet
            collectives.barrier(self.root_device)

    @override
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        return collectives.broadcast_object(obj, src)

    def take_module(self, module: pl.LightningModule | None, is_new: bool) -> None:
        """Called when Lightning sets the module, before it looks whether the module's steps are compiled."""
        if "parts" in vars(self):
            self.parts.take_module(module, is_new)

    @override
    def setup_environment(self) -> None:
        self.parts.validate(self.lightning_module, self.start_method, self.checkpoint_io)
        super().setup_environment()
        self.ranks.place(self.cluster_environment, self.parallel_devices, self.num_nodes)
        self.parts.join(self.lightning_module, self.cluster_environment, self.launcher)

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        init, building = private.empty_init(bool(empty_init)), self.parts.building(self.lightning_module)
        with self.precision_plugin.tensor_init_context(), self.root_device, init, building:
            yield

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        module, training = self.lightning_module, trainer.state.fn == TrainerFn.FITTING
        self.accelerator.setup(trainer)
        self.parts.before_setup(self.precision_plugin)
        if training and self.ranks.world_size > 1:
            private.sync_batchnorm(self)
        self.parts.module_setup.build(module, self.precision_plugin, training)
        self.model = module
        self.parts.checkpoints.load_into_divided()
        if training:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if training and not self._module_options.cpu_offload:
            private.optimizers_to_device(self.optimizers, self.root_device)
        self.parts.after_setup(trainer, {str(config.monitor) for config in self.lr_scheduler_configs}, training)

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        private.forget_optimizers(self)
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            self.parts.optimization.check(optimizer)

    @override
    def model_to_device(self) -> None:
        to_device(self.lightning_module, self.root_device)

    @override
    def batch_to_device(self, *args: Any, **kwargs: Any) -> Any:
        with self.parts.steps.trial():
            return super().batch_to_device(*args, **kwargs)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self.parts.optimization.before_training_step(args, kwargs)
        with self.precision_plugin.train_step_context():
            return self.parts.steps.run("training_step", args, kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        with self.precision_plugin.val_step_context():
            return self.parts.steps.run("validation_step", args, kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        with self.precision_plugin.test_step_context():
            return self.parts.steps.run("test_step", args, kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.predict_step_context():
            return self.parts.steps.predict(args, kwargs)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.parts.resume.on_train_batch_start()
        if self.parts.steps.control_flow is not None:
            self.parts.steps.control_flow.before_batch()

    @override
    def block_backward_sync(self) -> Any:
        return self.parts.optimization.accumulating()

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        with self.parts.steps.trial(), self.parts.tuning.apart(self.parts.module_setup.runner):
            loss = self.parts.optimization.before_backward(closure_loss, kwargs.get("inputs"))
            return super().backward(loss, optimizer, *args, **kwargs)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        with self.parts.steps.trial(), self.parts.optimization.step(optimizer, closure) as finished:
            return super().optimizer_step(optimizer, finished, *args, **kwargs)

    @override
    def on_train_start(self) -> None:
        self.parts.on_train_start()

    @override
    def on_validation_start(self) -> None:
        self.parts.loaders.begin_evaluation()
        self.parts.module_setup.share_buffers()

    @override
    def on_validation_end(self) -> None:
        self.parts.module_setup.reshard()

    @override
    def on_train_end(self) -> None:
        self.on_validation_start()
        self.parts.checkpoints.callback_saves.finish()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        if not self.parts.snapshots.is_taking:
            self.parts.module_setup.share_buffers()
        return self.parts.checkpoints.model_state(self.lightning_module)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return self.parts.checkpoints.optimizer_state(self.lightning_module, optimizer)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: private.Path, storage_options: Any = None) -> None:
        # that of a finder begins its search
        module, parts = self.lightning_module, self.parts
        filepath = parts.tuning.begin(filepath, private.trainer_of(module), parts.resume.last_step)
        parts.checkpoints.save(module, checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: private.Path, weights_only: bool | None = None) -> dict[str, Any]:
        # a finder goes back to where it was; the loaders begin their epoch anew
        searching = self.parts.tuning.is_searching
        return self.parts.checkpoints.load(self.parts.tuning.path(checkpoint_path), weights_only, resume=not searching)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self.parts.checkpoints.load_model_state(checkpoint, strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        self.parts.checkpoints.load_optimizer_states(checkpoint, self.optimizers)

    @override
    def remove_checkpoint(self, filepath: private.Path) -> None:
        self.parts.remove_checkpoint(filepath)

    def whole_state(self) -> dict[str, Any]:
        """The module's state dict, whole, on rank 0: for the process that started the others."""
        return self.parts.checkpoints.whole_model_state(self.lightning_module)

    @override
    def teardown(self) -> None:
        try:
            self.parts.checkpoints.saves.end()
        finally:
            self.parts.leave(self.optimizers)
            if self.ranks.holds_shards:  # what optimizers hold parts of stays where its mesh is
                self.parts.module_setup.move_to_cpu()
                self.precision_plugin.teardown()
                self.accelerator.teardown()
                self.checkpoint_io.teardown()
            else:
                super().teardown()
            self.parts.end()

    @override
    def on_exception(self, exception: BaseException) -> None:
        self.parts.end(exception, self.launcher)
