"""HybridStrategy: Lightning's hooks; each calls the part where the work is done."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.plugins import CheckpointIO, Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.strategy import TBroadcast
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dist import collectives
from lightning_dist.checkpoint.lazy_tensors import read_kept_tensors
from lightning_dist.compat import lightning as private
from lightning_dist.compiled_module import CompiledModule
from lightning_dist.elastic.guard import begin_run, end_run
from lightning_dist.layout import Layout, ParallelMesh
from lightning_dist.parallel import Checkpointing
from lightning_dist.parallel.pipeline import BatchSplit, PipelineOptions
from lightning_dist.patches import Patches
from lightning_dist.plans.tensor import Styles, TensorOptions
from lightning_dist.ranks import LayoutRanks
from lightning_dist.report import LayoutReport
from lightning_dist.trainer.checkpoints import Checkpoints, Format
from lightning_dist.trainer.coordination import Coordination
from lightning_dist.trainer.loaders import Loaders
from lightning_dist.trainer.module_setup import ModuleOptions, ModuleSetup, ShardUnits, to_device
from lightning_dist.trainer.optimization import Optimization
from lightning_dist.trainer.resume import Resume
from lightning_dist.trainer.steps import Steps
from lightning_dist.tuning import Tuning, validate_tuner
from lightning_dist.validation import validate_trainer, warn_of_axes_across_nodes


@private.told_of_module
class HybridStrategy(ParallelStrategy):
    """Trains any LightningModule, unchanged, over a layout of data and model parallelism.

    Args:
        layout: degrees of the axes: a :class:`~lightning_dist.Layout`, a mapping, a string such as
            ``"dp_replicate=2,dp_shard=4"``, or ``"auto"``: replicate what fits on a device, shard what doesn't.
        shard_units: the modules to shard one by one, by name (with ``*``), class name, class, or a function of name and
            module. Default: the repeated blocks of the network.
        tensor_plan: what ``tp`` divides: ``"colwise"`` or ``"rowwise"`` by name of layer (with ``*``), or a function of
            name and module. Default: attention and feed-forward layers, found by what they are made of, and what a
            transformers model declares.
        sequence_parallel: under ``tp``, between the blocks of a network each rank holds its part of the positions: the
            same bytes are communicated, and what norms, dropout and residuals keep for backward is divided too. What a
            network collects between blocks is the part; hooks on the blocks themselves are refused.
        loss_parallel: under ``tp``, logits stay divided by vocabulary: ``cross_entropy`` never gathers them, anything
            else that looks at them does. Default: they are gathered at once.
        pipeline_schedule: under ``pp``: ``"GPipe"``, ``"1F1B"``, ``"Interleaved1F1B"``, ``"LoopedBFS"``,
            ``"InterleavedZeroBubble"``, ``"ZBVZeroBubble"`` or ``"DualPipeV"``, of torch.distributed.pipelining. The
            first two have one stage a rank, the others two.
        num_microbatches: into how many a batch is split under ``pp``. Default: four per rank of the axis, or fewer, so
            that each has two samples at least where the batch has two for each rank.
        pipeline_cuts: the modules after which the network is cut under ``pp``, by name. Default: those that balance
            the cost of the stages.
        pipeline_reshard: under ``pp`` with ``dp_shard``, free sharded parameters after each microbatch and gather them
            again, which saves memory. Default: they are gathered once a step.
        pipeline_check: under ``pp``, the first time that a kind of step runs, compare what it returns, logs and keeps
            over microbatches with what it does over the whole batch at once, for which it runs twice more without
            gradients; another result is an error. Off, it trains on the weighted mean of the microbatches, whatever
            that is.
        pipeline_outputs: under ``pp``, send what a step returns beside its loss, appends to lists of the module and
            keeps in its attributes, from the last stage to every rank of the axis. Off, that stays there, where it is
            too large to send; predictions are sent all the same.
        batch_split: where a batch has its samples, under ``pp``: a tree like the batch, or like the upper part of it,
            of the dim for tensors, ``"each"`` for a list of one item a sample, None for what every microbatch gets as
            it is; or a function of a batch and a number of parts that returns the parts. Default: the first dim of all
            tensors and arrays that have the size there that most have, and lists of as many items.
        microbatch_weight: a function of a microbatch, of what its loss is a mean over, under ``pp``: of the number of
            labels that are not ignored, say. Default: its samples.
        activation_checkpointing: ``"full"``, the repeated blocks keep only their inputs and outputs for backward, and
            compute the rest again; ``"selective"``, they also keep the results of matrix products, convolutions and
            attention, and compute the rest again; ``"none"``, nothing is computed twice.
        compile: True, or the keyword arguments of ``torch.compile``: compiles the blocks one by one.
        checkpoint_format: ``"single"``, one file as Lightning writes it; ``"sharded"``, a directory to which every rank
            writes what it holds; ``"auto"``, sharded where parameters are, but for a ``CheckpointIO`` of the user's,
            which writes one file.
        async_save: write checkpoints while the training goes on; it stops for the copy to host memory only, which takes
            as much of that as the rank's part of the checkpoint (of a single file, rank 0 takes the whole).
        pretrained: weights that a fit begins from; a checkpoint that it goes on from is read over them. A file of torch
            or safetensors, as of torchvision and timm, a directory of transformers, or a checkpoint of ours or of
            Lightning. Each rank reads what it owns. The names may lack what the module puts before them, as
            ``"model."``; the module's ``strict_loading = False`` allows missing and unexpected ones.
        start_method: how Lightning starts the other processes of a script: ``"popen"``, ``"spawn"``, ``"fork"`` or
            ``"forkserver"``. Under torchrun, SLURM and the like they are there already.
        process_group_backend: of torch.distributed; by default that of the device.
        timeout: of collectives.
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin: as for Lightning's
            strategies; the Trainer sets them.

    Raises:
        ValueError: see :class:`~lightning_dist.Layout`; a layout that does not fit the number of processes is refused
            when the Trainer is made, before any process starts.

    What is communicated: see :class:`~lightning_dist.parallel.Replicated` and
    :class:`~lightning_dist.parallel.Sharded` for a step, :func:`~lightning_dist.gradients.global_norm` for clipping,
    :class:`~lightning_dist.logs.StepLogs` for logged values.
    """

    strategy_name = "hybrid"

    def __init__(
        self,
        layout: Layout | Mapping[str, int] | str = "auto",
        *,
        shard_units: ShardUnits | None = None,
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
        self.start_method = _one_of("start_method", start_method, ("popen", "spawn", "fork", "forkserver"))
        self.num_nodes = 1
        cuts: Any = pipeline_cuts if pipeline_cuts is None or isinstance(pipeline_cuts, str) else list(pipeline_cuts)
        stages = (pipeline_schedule, num_microbatches, cuts, pipeline_reshard)
        self._module_options = ModuleOptions(
            shard_units,
            TensorOptions(tensor_plan, sequence_parallel, loss_parallel),
            PipelineOptions(*stages, batch_split, microbatch_weight, pipeline_check, pipeline_outputs),
            _one_of("activation_checkpointing", activation_checkpointing, ("none", "full", "selective")),
            None if compile is False else {} if compile is True else dict(compile),
        )
        self._checkpoint_options: Any = {
            "format": _one_of("checkpoint_format", checkpoint_format, ("auto", "single", "sharded")),
            "in_background": async_save,
            "pretrained": pretrained,
        }
        self.ranks = LayoutRanks(Layout.parse(layout), process_group_backend, timeout)
        self._make_parts()

    def _make_parts(self) -> None:
        """Makes what belongs to the processes of a run."""
        ranks = self.ranks
        self.tuning = Tuning()
        self.loaders = Loaders(ranks)
        self.module_setup = ModuleSetup(ranks, self._module_options)
        self.resume = Resume(ranks, self.loaders, self.module_setup.share_buffers)
        self.checkpoints = Checkpoints(ranks, self.resume, **self._checkpoint_options)
        self.optimization = Optimization(ranks, self.module_setup)
        self.coordination = Coordination(ranks, self.loaders, self.module_setup, self.resume)
        self.steps = Steps(ranks, self.module_setup, self.loaders, self.coordination, self.tuning)
        self._patches, self._setup_patches = Patches(), Patches()
        """Of a run, and of what is set up in it."""
        self._is_in_run = self._is_set_up = False
        self._compiled: CompiledModule | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies, and for what is sent elsewhere: without what belongs to the processes of a run."""
        return {name: value for name, value in super().__getstate__().items() if name not in _OF_A_RUN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._make_parts()

    def __repr__(self) -> str:
        """What Fabric shows when it is given one."""
        return f"<{type(self).__name__}, for a Trainer; for Fabric there is HybridFabricStrategy>"

    # ------------------------------------------------------------------ what users ask

    @property
    def layout(self) -> Layout | None:
        """The layout, resolved; None while ``"auto"`` is undecided."""
        return self.ranks.layout

    @property
    def mesh(self) -> ParallelMesh | None:
        """The ranks along the axes of the layout; None for one process."""
        return self.ranks.mesh

    @property
    def num_data_ranks(self) -> int:
        """Number of ranks, or groups of ranks, that see different samples."""
        return self.ranks.num_data_ranks

    @property
    def data_rank(self) -> int:
        """Which of the data ranks this is; ranks with the same one see the same samples."""
        return self.ranks.data_rank

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold different samples; None for one process."""
        return self.ranks.data_group

    @property
    def gradient_norm(self) -> Tensor | None:
        """Norm of the gradients before the last clipping by norm; the same on every rank."""
        return self.optimization.gradient_norm

    def explain(self, module: pl.LightningModule, num_ranks: int, batch: Any = None) -> LayoutReport:
        """What this strategy would do to a module on so many ranks, without processes or training.

        Args:
            module: with its network, on any device or on meta; it stays as it is.
            num_ranks: of the whole run.
            batch: for its training step; a pipeline is cut by running it. Default: the module's
                ``example_input_array``, for its forward.

        Raises:
            ValueError: as a fit would.
        """
        return self.module_setup.explain(module, num_ranks, batch)

    # ------------------------------------------------------------------ ranks

    @property
    def is_distributed(self) -> bool:
        """Whether several ranks run something together now; Lightning asks strategies that are not its own.

        It asks for values logged with ``sync_dist=True``, in steps and hooks, and before a run to refuse its finder of
        a batch size, which works here: see ``tuning``.
        """
        return self._is_set_up and self.world_size > 1

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    @override
    def global_rank(self) -> int:
        self.coordination.note_place("global_rank")
        return super().global_rank

    @property
    @override
    def world_size(self) -> int:
        self.coordination.note_place("world_size")
        return super().world_size

    @property
    def num_processes(self) -> int:
        """Processes of this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def process_group_backend(self) -> str:
        """Backend of torch.distributed."""
        return self.ranks.backend

    def set_world_ranks(self) -> None:
        """Called by the Trainer as soon as devices and nodes are known: the layout is checked here."""
        self._place()
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally and self.ranks.world_size > 1:
            private.set_launcher(self, self.start_method)

    def _place(self) -> None:
        assert self.cluster_environment is not None
        self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        rank_zero_only.rank = fabric_rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]
        self.ranks.place(self.global_rank, self.root_device, self.num_processes, self.num_nodes)

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
        return self.coordination.all_gather(tensor, group, sync_grads)

    @override
    def barrier(self, name: str | None = None) -> None:
        if name == "run-stage":  # all that Lightning restores has been restored (seen in 2.6.6)
            read_kept_tensors()
        self.tuning.raise_if_broken()
        collectives.barrier(self.root_device)

    @override
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        return collectives.broadcast_object(obj, src)

    # ------------------------------------------------------------------ the set-up of a run

    def take_module(self, module: pl.LightningModule | None, is_new: bool) -> None:
        """Called when Lightning sets the module, before it looks whether the module's steps are compiled."""
        if module is not None and CompiledModule.compiles(module):
            self._compiled = CompiledModule(module)
        elif is_new:
            self._compiled = None

    @override
    def setup_environment(self) -> None:
        module, ranks = self.lightning_module, self.ranks
        assert module is not None
        assert self.cluster_environment is not None
        self._is_in_run = True
        if ranks.world_size > 1:
            begin_run()
        self._refuse(module)
        self._patches.undo()
        self.checkpoints.attach(module.trainer, self.checkpoint_io)
        super().setup_environment()
        self._place()
        is_new = not dist.is_initialized()
        ranks.join(self.cluster_environment)
        if is_new and ranks.world_size > 1:
            begin_run()
        ranks.form_mesh()
        private.show_mesh(module, None if ranks.mesh is None else ranks.mesh.root)
        self.loaders.attach(module.trainer, self._patches)
        self.resume.attach(module.trainer, self._patches)

    def _refuse(self, module: pl.LightningModule) -> None:
        """Raises before process groups form."""
        if self._compiled is not None:
            self._compiled.validate(self.layout)
        validate_trainer(module.trainer, self.layout, self.root_device)
        self.module_setup.refuse_what_cannot_split(module)
        if self.layout is not None:
            self._module_options.pipeline.refuse(self.layout.pp)
            warn_of_axes_across_nodes(self.layout, self.num_processes, self.num_nodes)
        validate_tuner(module.trainer, self.start_method)

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """``configure_model`` runs here; outside of a run, in ``Trainer.init_module``, a module is built whole."""
        module = self.lightning_module
        defers = self.module_setup.deferring(module) if self._is_in_run and module is not None else nullcontext()
        init = private.empty_init(bool(empty_init))
        with self.precision_plugin.tensor_init_context(), self.root_device, init, defers:
            yield

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        module, training = self.lightning_module, trainer.state.fn == TrainerFn.FITTING
        assert self.accelerator is not None
        assert module is not None
        self._setup_patches.undo()
        self.accelerator.setup(trainer)
        self.checkpoints.before_setup()
        self.optimization.attach(self.precision_plugin, self._setup_patches)
        if training and self.ranks.world_size > 1:
            private.sync_batchnorm(self)
        self.module_setup.build(module, self.precision_plugin, training)
        self.model = module
        self.checkpoints.load_into_divided()
        if training:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if training:
            private.optimizers_to_device(self.optimizers, self.root_device)
        self.steps.attach()
        self.coordination.attach(trainer, {str(c.monitor) for c in self.lr_scheduler_configs}, self._setup_patches)
        if self._compiled is not None:
            self._compiled.validate(self.layout)
        self._compile_again()
        if not training:
            self.ranks.part_random_streams()
        self._is_set_up = True
        self.module_setup.report(module).show(trainer)

    def _compile_again(self) -> None:
        compiled, self._compiled = self._compiled, None
        if compiled is not None:
            compiled.put_back()

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        private.forget_optimizers(self)
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            self.optimization.check(optimizer)

    @override
    def model_to_device(self) -> None:
        assert self.lightning_module is not None
        to_device(self.lightning_module, self.root_device)

    # ------------------------------------------------------------------ steps

    @override
    def batch_to_device(self, *args: Any, **kwargs: Any) -> Any:
        with self.steps.trial():
            return super().batch_to_device(*args, **kwargs)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self.optimization.before_training_step()
        with self.precision_plugin.train_step_context():
            return self.steps.run("training_step", args, kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        with self.precision_plugin.val_step_context():
            return self.steps.run("validation_step", args, kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        with self.precision_plugin.test_step_context():
            return self.steps.run("test_step", args, kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.predict_step_context():
            return self.steps.predict(args, kwargs)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.resume.on_train_batch_start()
        self.coordination.before_batch()

    # ------------------------------------------------------------------ gradients

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator:
        with self.optimization.accumulating():
            yield

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        loss = self.optimization.before_backward(closure_loss, kwargs.get("inputs"))
        with self.steps.trial(), self.tuning.apart(self.steps.runner):
            return super().backward(loss, optimizer, *args, **kwargs)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        with self.steps.trial(), self.optimization.step(optimizer, closure) as finished:
            return super().optimizer_step(optimizer, finished, *args, **kwargs)

    # ------------------------------------------------------------------ between the phases

    @override
    def on_train_start(self) -> None:
        # until here all data ranks draw the same random numbers: hooks may have initialised parameters
        self.ranks.part_random_streams()
        self.resume.on_train_start()
        self.checkpoints.on_train_start()
        self.tuning.watch_losses()

    @override
    def on_validation_start(self) -> None:
        self.loaders.begin_evaluation()
        self.module_setup.share_buffers()

    @override
    def on_validation_end(self) -> None:
        self.steps.runner.reshard()

    @override
    def on_train_end(self) -> None:
        self.on_validation_start()
        self.checkpoints.saves.wait()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    # ------------------------------------------------------------------ checkpoints

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        self.module_setup.share_buffers()
        return self.checkpoints.model_state(self.lightning_module)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.checkpoints.optimizer_state(self.lightning_module, optimizer)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: private.Path, storage_options: Any | None = None
    ) -> None:
        # that of a finder begins its search
        module = self.lightning_module
        assert module is not None
        filepath = self.tuning.begin(filepath, module.trainer, self.ranks, self.resume.last_step)
        self.checkpoints.save(module, checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: private.Path, weights_only: bool | None = None) -> dict[str, Any]:
        # a finder goes back to where it was; the loaders begin their epoch anew
        searching = self.tuning.is_searching
        return self.checkpoints.load(self.tuning.path(checkpoint_path), weights_only, resume=not searching)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self.checkpoints.load_model_state(checkpoint, strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        self.checkpoints.load_optimizer_states(checkpoint, self.optimizers)

    @override
    def remove_checkpoint(self, filepath: private.Path) -> None:
        ends = self.tuning.ends_with(filepath)
        self.checkpoints.remove(self.tuning.path(filepath) if ends else filepath)
        if ends:
            self.resume.last_step = self.tuning.end()

    def whole_state(self) -> dict[str, Any]:
        """The module's state dict, whole, on rank 0: for the process that started the others."""
        assert self.lightning_module is not None
        return self.checkpoints.whole_model_state(self.lightning_module)

    # ------------------------------------------------------------------ the end

    @override
    def teardown(self) -> None:
        try:
            self.checkpoints.saves.end()
        finally:
            self._leave()
            if self.ranks.world_size > 1:
                end_run(self.ranks.groups)

    def _leave(self) -> None:
        self._is_in_run = self._is_set_up = False
        self._compile_again()  # where the run ended before it was set up
        if self.tuning.is_searching:
            self.resume.last_step = self.tuning.leave()
        self.checkpoints.detach()
        self._setup_patches.undo()
        self._patches.undo()
        self.module_setup.reshard()
        if not self.ranks.holds_shards:
            super().teardown()
            return
        assert self.accelerator is not None  # DTensors stay where their mesh is
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self.ranks.world_size > 1:
            end_run(self.ranks.groups, exception, self.launcher)
        self.steps.forget()
        self.checkpoints.end_saves(exception)


_OF_A_RUN = frozenset(
    [
        *("loaders", "module_setup", "resume", "checkpoints", "optimization", "coordination", "steps", "tuning"),
        *("_compiled", "_patches", "_setup_patches", "_is_in_run", "_is_set_up"),
    ]
)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
    return value
