"""HybridStrategy: Lightning's hooks; each calls the room where the work is done."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.init import _EmptyInit  # of Trainer.init_module(empty_init=True); seen in 2.6.6
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import CheckpointIO, Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dist import gradients, optimizers
from lightning_dist.automatic import choose_layout
from lightning_dist.checkpoint.background import BackgroundSaves
from lightning_dist.compiled_module import CompiledModule
from lightning_dist.course import Course
from lightning_dist.data import refuse_different_batches
from lightning_dist.divided import divide
from lightning_dist.divided.averages import divide_copies
from lightning_dist.divided.compiled import show_parts_to_compiled
from lightning_dist.elastic.guard import begin_run, end_run
from lightning_dist.initialization import CannotDefer, RecordedInit, record_initialization
from lightning_dist.layout import MESH_AXES, Layout
from lightning_dist.logs import StepLogs, Uncounted, attach_metrics
from lightning_dist.parallel import (
    Alone,
    Checkpointing,
    Replicated,
    Sharded,
    flat_broadcast,
    parallelize,
    refuse_no_blocks,
)
from lightning_dist.parallel.equal import make_copies_equal
from lightning_dist.parallel.pipeline import (
    BatchSplit,
    PartitionedModule,
    PipelineOptions,
    PipelineRunner,
    partition_module,
    partition_of,
    plan_stages,
)
from lightning_dist.parallel.replaced import Replaced
from lightning_dist.patches import Patches
from lightning_dist.placeholder import held
from lightning_dist.plans import find_blocks, select_blocks
from lightning_dist.plans.tensor import Division, Styles, TensorOptions, parameter_splits
from lightning_dist.precision import make_agreeing, shard_policy
from lightning_dist.refusals import (
    has_lazy_parameters,
    refuse,
    refuse_early_hooks,
    refuse_lazy,
    refuse_lost_hooks,
    refuse_mixed_vector,
    refuse_new_parameters,
    refuse_unknown,
    refuse_wrappers,
    warn_of_axes_across_nodes,
)
from lightning_dist.report import LayoutReport, PipelineReport
from lightning_dist.tuning import TuningHooks
from lightning_dist.uneven import Gathering

ShardUnits = Iterable[str | type[nn.Module]] | Callable[[str, nn.Module], bool]


class HybridStrategy(TuningHooks):
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

    _module: pl.LightningModule | None = None
    _compiled: CompiledModule | None = None
    """What the user compiled whole, until it has been set up."""

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
        checkpoint_format: Literal["auto", "single", "sharded"] = "auto",
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
        super().__init__(
            Layout.parse(layout),
            _one_of("start_method", start_method, ("popen", "spawn", "fork", "forkserver")),
            process_group_backend,
            timeout,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self.gradient_norm: Tensor | None = None
        """Norm of the gradients before the last clipping by norm; the same on every rank."""
        self.checkpoint_format = _one_of("checkpoint_format", checkpoint_format, ("auto", "single", "sharded"))
        self.async_save = async_save
        self._saves = BackgroundSaves()
        self.pretrained = pretrained
        self.activation_checkpointing: Checkpointing = _one_of(
            "activation_checkpointing", activation_checkpointing, ("none", "full", "selective")
        )
        self._shard_units = shard_units
        self._compile_options = None if compile is False else {} if compile is True else dict(compile)
        self.recomputed_blocks: list[str] = []
        """Names of the modules that compute their forward again in backward, once a fit has been set up."""
        self._parallel: Alone | None = None
        self.division: Division | None = None
        """What ``tp`` divides, once the strategy has been set up."""
        self._tensor_options = TensorOptions(tensor_plan, sequence_parallel, loss_parallel)
        cuts: Any = pipeline_cuts if pipeline_cuts is None or isinstance(pipeline_cuts, str) else list(pipeline_cuts)
        self._pipeline_options = PipelineOptions(
            pipeline_schedule,
            num_microbatches,
            cuts,
            pipeline_reshard,
            batch_split,
            microbatch_weight,
            pipeline_check,
            pipeline_outputs,
        )
        self._is_in_run = False
        """Since the environment was set up."""
        self._logs: StepLogs | None = None
        self._course: Course | None = None
        self._recorded: RecordedInit | None = None
        self._has_run_backward = False
        """Whether a backward pass of this run was the strategy's."""
        self._known_parameters: dict[int, nn.Parameter] = {}
        """Those of the module when the run began, by id; held, so that an id is not used again."""
        self._inference_modes: dict[Any, bool] = {}
        """What the user asked of the loops of evaluation, until the run ends."""
        self._epoch_of_copies = -1
        """Whose first step saw that the data ranks' copies are equal."""
        self._compared: set[str] = set()
        """Steps whose first batch was seen to be the same on the ranks that share samples."""
        self.sharding_reason = ""
        """Why ``"auto"`` chose the layout; empty where the user did."""

    def __getstate__(self) -> dict[str, Any]:
        """For copies, and for what is sent elsewhere: without what belongs to the processes of a run."""
        of_the_run = (
            "mesh",
            "_parallel",
            "_logs",
            "_course",
            "_recorded",
            "_world_calls",
            "_saves",
            "_begin_again",
            "_prepared",
        )
        return {name: value for name, value in super().__getstate__().items() if name not in of_the_run} | {
            "_known_parameters": {},
            "_is_set_up": False,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.mesh = self._parallel = self._logs = self._course = self._recorded = None
        self._world_calls = self._begin_again = None
        self._saves = BackgroundSaves()

    @property
    def _lightning_module(self) -> pl.LightningModule | None:
        return self._module

    @_lightning_module.setter
    def _lightning_module(self, module: pl.LightningModule | None) -> None:
        """Set by Lightning, before it looks whether the module's steps are compiled."""
        before, self._module = self._module, module
        if module is not before:
            self._compiled = None
        if module is not None and CompiledModule.compiles(module):
            self._compiled = CompiledModule(module)

    @override
    def setup_environment(self) -> None:
        assert self.lightning_module is not None
        self._is_in_run = True
        if self.world_size > 1:
            begin_run()
        if self._compiled is not None:
            self._compiled.refuse(self.layout)
        refuse(self.lightning_module.trainer, self.layout, self.root_device)
        self._refuse_what_cannot_split(self.lightning_module)
        if self.layout is not None:
            self._pipeline_options.refuse(self.layout.pp)
            warn_of_axes_across_nodes(self.layout, self.num_processes, self.num_nodes)
        super().setup_environment()
        self._own_dataloaders(self.lightning_module.trainer)

    def _refuse_what_cannot_split(self, module: pl.LightningModule) -> None:
        """Before process groups form, where the network is there already; :meth:`_parallelize` asks again."""
        if is_overridden("configure_model", module) or is_overridden("setup", module) or has_lazy_parameters(module):
            return
        self._divide(module)
        if module.trainer.state.fn == TrainerFn.FITTING and self.activation_checkpointing != "none":
            refuse_no_blocks(module, self._blocks(module), self.activation_checkpointing)

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
        reason = ""
        if self.requested is None:
            layout, reason = choose_layout(module, num_ranks, torch.device("cpu"), num_ranks)
        else:
            layout = self._resolve(self.requested, num_ranks)
        blocks = self._blocks(module)
        refuse_no_blocks(module, blocks, self.activation_checkpointing)
        stages = None
        if layout.pp > 1:
            self._pipeline_options.refuse(layout.pp)
            stages = plan_stages(
                module, self._pipeline_options, layout.pp, list(blocks), self._keeps_blocks_whole(layout), batch
            )
        return LayoutReport.planned(
            module,
            layout,
            self._tensor_options.divide(module, layout.tp, blocks),
            list(blocks),
            stages,
            pipeline=None if stages is None else PipelineReport.of(module, stages, self._pipeline_options),
            reason=reason,
            recomputed=list(blocks) if self.activation_checkpointing != "none" else [],
            checkpointing=self.activation_checkpointing,
        )

    def cuts(self, num_ranks: int) -> bool:
        """Whether the layout has a pipeline on so many ranks."""
        return self.requested is not None and self._resolve(self.requested, num_ranks).pp > 1

    def _divide(self, module: pl.LightningModule) -> Division | None:
        if self.layout is None:
            return None
        return self._tensor_options.divide(module, self.layout.tp, self._blocks(module))

    def _blocks(self, module: pl.LightningModule) -> dict[str, nn.Module]:
        return find_blocks(module) if self._shard_units is None else select_blocks(module, self._shard_units)

    # ------------------------------------------------------------------ model

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """``configure_model`` runs here: what it builds is deferred where the layout shards, see ``initialization``.

        Outside of a run, in ``Trainer.init_module``, a module is built whole.
        """
        with self.precision_plugin.tensor_init_context(), self.root_device, _EmptyInit(enabled=bool(empty_init)):
            if not self._is_in_run or self.world_size == 1 or (self.layout is not None and not self.layout.defers):
                yield
                return
            assert self.lightning_module is not None
            try:
                with record_initialization() as self._recorded:
                    yield
            except CannotDefer as error:
                rank_zero_warn(f"{error} It is now built whole on every rank before it is sharded.")
                self._recorded = None
                self.lightning_module.configure_model()
                refuse_unknown(self.lightning_module)
            else:
                self._recorded.bind(self.lightning_module)

    def _materialize(self, module: pl.LightningModule) -> None:
        """Gives what ``configure_model`` deferred the values of plain building; a rank keeps its part."""
        if self._recorded is not None and self._recorded.names:
            self._recorded.materialize(module, device=self.root_device)
        self._recorded = None

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        self._end_restoring()
        self._compared.clear()
        self._own_clipping()
        self._own_inference(trainer)
        self._parallelize(training=trainer.state.fn == TrainerFn.FITTING)
        self._load_weights()
        self._look_at_world_calls()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            _optimizers_to_device(self.optimizers, self.root_device)
        stage = self._parallel.place if isinstance(self._parallel, PipelineRunner) else None
        self._logs = StepLogs(trainer, self._monitored(trainer), self.logs_group, self._dealt, stage)
        self._logs.attach()
        if trainer.state.fn == TrainerFn.FITTING and self.world_size > 1:
            assert self._parallel is not None
            self._course = Course(trainer, self._parallel, self.root_device, self._timeout or default_pg_timeout)
            self._course.attach()
        if self.logs_group is not None:
            attach_metrics(self.lightning_module, self.logs_group)
        self._own_gathering()
        if self._compiled is not None:
            self._compiled.refuse(self.layout)
            self._compiled.put_back()
            self._compiled = None
        if trainer.state.fn != TrainerFn.FITTING:
            self._part_random_streams()
        self._epoch_of_copies = -1
        self._is_set_up = True
        LayoutReport.of(self).show(trainer)

    def _own_gathering(self) -> None:
        module, group = self.lightning_module, self.data_group
        if module is None or group is None or self.num_data_ranks == 1 or "all_gather" in vars(module):
            return
        vars(module)["all_gather"] = Gathering(module, group, lambda: self._logs is None or not self._logs.repeats)

    @property
    def sharded_units(self) -> list[str]:
        """Names of the modules that are sharded one by one."""
        parallel = self._parallel.inner if isinstance(self._parallel, PipelineRunner) else self._parallel
        return list(parallel.units) if isinstance(parallel, Sharded) else []

    def _own_clipping(self) -> None:
        """Lightning clips through the precision plugin, over what one rank holds."""
        plugin: Any = self.precision_plugin
        plugin.clip_grad_by_norm = self._clip_by_norm
        plugin.clip_grad_by_value = self._clip_by_value
        plugin.post_backward = partial(self._after_backward, type(plugin).post_backward.__get__(plugin))
        plugin._after_closure = partial(self._before_step, type(plugin)._after_closure.__get__(plugin))
        if self.world_size > 1:
            make_agreeing(plugin)

    def _own_inference(self, trainer: pl.Trainer) -> None:
        """Evaluation runs without gradients, but not in inference mode: what fully_shard gathers into would be
        inference tensors, which a later fit can't write to. Lightning does so for its own FSDPStrategy (seen in 2.6.6).
        """
        self._inference_modes = {}
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            if self.world_size > 1:
                self._inference_modes[loop], loop.inference_mode = loop.inference_mode, False

    def _parallelize(self, training: bool) -> None:
        module = self.lightning_module
        assert module is not None
        if self.world_size > 1:
            refuse_lazy(module)
        self._sync_batchnorm(training)
        was_cut = (
            partition_of(module) is not None
        )  # its ranks hold different parameters by now, and placeholders for others
        if not was_cut:
            self.precision_plugin.convert_module(module)
        if self.layout is None:
            self.layout, self.sharding_reason = choose_layout(
                module, self.world_size, self.root_device, self.num_processes
            )
            self._build_mesh()
            refuse(module.trainer, self.layout, self.root_device)
        self._refuse_other_mesh(module)
        self.division = self._divide(module)
        refuse_wrappers(module, self.layout, parameter_splits(self.division.plan) if self.division else ())
        fresh = not was_cut and not any(isinstance(p, DTensor) for p in module.parameters())
        if not fresh:
            refuse_new_parameters(module, self._known_parameters)
        if fresh:
            self.model_to_device()
            if self.world_size > 1 and not (training and not self.layout.holds_shards):
                flat_broadcast(
                    [t for t in _tensors(module) if not t.is_meta], dist.distributed_c10d._get_default_group()
                )
        if not self.layout.defers:
            self._materialize(module)
        blocks = self._blocks(module)
        hooked = {name: p for name, p in module.named_parameters() if _has_hooks(p)}
        replaced = Replaced(module)
        partitioned = self._partition(module, list(blocks)) if self.layout.pp > 1 else None
        self.recomputed_blocks = list(blocks) if training and self.activation_checkpointing != "none" else []
        self._parallel = parallelize(
            module,
            self.layout,
            self.mesh,
            division=self.division,
            blocks=blocks,
            policy=shard_policy(self.precision_plugin, self.root_device),
            device=self.root_device,
            activation_checkpointing=self.activation_checkpointing,
            compile_options=self._compile_options,
            training=training,
            partitioned=partitioned,
            pipeline_options=self._pipeline_options,
            patches=Patches(),
        )
        refuse_lost_hooks(module, hooked)
        self._parallel.reshard()
        self._materialize(module)
        hooked.clear()
        replaced.exchange(module, self._owners(module.trainer))
        divide(module)
        self._parallel.show()
        show_parts_to_compiled(module)
        divide_copies(module.trainer.callbacks, module)  # type: ignore[attr-defined]
        self.model = module
        self._has_run_backward = False
        self._known_parameters = {id(p): p for p in module.parameters()}

    @staticmethod
    def _owners(trainer: Any) -> list[object]:
        """Who may have collected parameters of the module before it was divided."""
        return [*trainer.callbacks, *filter(None, [trainer.datamodule])]

    def _partition(self, module: pl.LightningModule, blocks: list[str]) -> PartitionedModule:
        """Leaves this rank the stages of the pipeline that are its own."""
        assert self.mesh is not None
        assert self.layout is not None
        policy = shard_policy(self.precision_plugin, self.root_device)
        if self._recorded is not None and any(buffer.is_meta for buffer in module.buffers()):
            # what depends on no parameter is traced for real
            self._recorded.materialize(module, device=self.root_device, parameters=False)
        return partition_module(
            module,
            module.trainer,
            self._pipeline_options,
            self.mesh.root["pp"].get_group(),
            blocks,
            undivided=[] if self.division is None else list(self.division.plan),
            keep_whole=self._keeps_blocks_whole(self.layout),
            device=self.root_device,
            dtype=policy.param_dtype if self.layout.dp_shard > 1 else None,
            patches=Patches(),
        )

    def _keeps_blocks_whole(self, layout: Layout) -> bool:
        """Whether something is done to blocks that a cut inside of them would break."""
        recomputes = self.activation_checkpointing != "none"
        return layout.holds_parts_of_blocks or self._compile_options is not None or recomputes

    def pipeline_report(self) -> PipelineReport | None:
        """Of the stages, once the strategy has been set up; None without a pipeline."""
        if not isinstance(self._parallel, PipelineRunner):
            return None
        return PipelineReport.of(self._parallel.module, self._parallel.stages, self._pipeline_options)

    def _sync_batchnorm(self, training: bool) -> None:
        if self._layer_sync is not None and training and self.world_size > 1:
            assert self.model is not None
            self._layer_sync.apply(self.model)

    def _refuse_other_mesh(self, module: pl.LightningModule) -> None:
        cut = partition_of(module)
        if cut is not None:
            assert self.layout is not None
            cut.refuse_other(0 if self.mesh is None else self.mesh.root["pp"].get_local_rank(), self.layout.pp)
        for parameter in module.parameters():
            if isinstance(parameter, DTensor):
                mesh = parameter.device_mesh
                mine = {} if self.mesh is None else dict(zip(MESH_AXES, self.mesh.root.shape, strict=True))
                if any(mine.get(axis) != mesh[axis].size() for axis in mesh.mesh_dim_names or ()):
                    raise ValueError(
                        f"this module is sharded over {parameter.device_mesh} from an earlier run, and the layout "
                        f"is now {self.layout}; build the module anew and pass ckpt_path= to go on from its checkpoint"
                    )
                return

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        self._reset_optimizers_and_schedulers()
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            refuse_mixed_vector(optimizer)
            optimizers.settle(optimizer)
            if self._holds_shards:
                optimizers.refuse_inexact(optimizer, self.layout, self.root_device)
            # a forward pass without a backward leaves a root gathered: the step must not go on beside the gathered copy
            optimizer.register_step_pre_hook(lambda *_: self._parallel.reshard() if self._parallel else None)

    def _monitored(self, trainer: pl.Trainer) -> set[str]:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        names = {str(getattr(callback, "monitor", None)) for callback in callbacks}
        for callback in callbacks:  # ranks must agree on a file's name
            names |= set(re.findall(r"\{([^}:]+)", str(getattr(callback, "filename", None) or "")))
        return names | {str(config.monitor) for config in self.lr_scheduler_configs}

    @override
    def model_to_device(self) -> None:
        assert self.lightning_module is not None
        _to_device(self.lightning_module, self.root_device)

    # ------------------------------------------------------------------ steps

    def _run(self, step: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._parallel is not None
        if self.mesh is not None and step not in self._compared:
            self._compared.add(step)
            for axis in ("pp", "tp"):
                refuse_different_batches(step, args, self.mesh.root[axis].get_group())
        logs = nullcontext() if self._logs is None else self._logs.of_step()
        calls = nullcontext() if self._world_calls is None else self._world_calls.of_step()
        with self._trial(), logs, calls:
            return self._parallel.run(step, *args, **kwargs)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        assert self._parallel is not None
        self._keep_copies_equal()
        self._parallel.before_training_step()
        with self.precision_plugin.train_step_context():
            return self._run("training_step", args, kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        with self.precision_plugin.val_step_context():
            return self._run("validation_step", args, kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        with self.precision_plugin.test_step_context():
            return self._run("test_step", args, kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Each rank predicts its own batches, in order: batch i of data rank r is the loader's batch i * n + r."""
        assert self.lightning_module is not None
        index = self._batch_index(args)
        repeated = None if self._counts(*index) else Uncounted(self.lightning_module.trainer)
        with self.precision_plugin.predict_step_context():
            prediction = self._run("predict_step", args, kwargs)
        if repeated is None:
            return prediction
        repeated.put_back()
        return self._drop_prediction(*index)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self._course is not None:
            self._course.before_batch()

    # ------------------------------------------------------------------ gradients

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator:
        assert self._parallel is not None
        # what looks at gradients after a micro-step sees those of one process: they are reduced at each
        with nullcontext() if self._gradients_are_watched else self._parallel.accumulating():
            yield

    @property
    def _gradients_are_watched(self) -> bool:
        assert self.lightning_module is not None
        callbacks: list[Any] = self.lightning_module.trainer.callbacks  # type: ignore[attr-defined]
        hook = "on_after_backward"
        return is_overridden(hook, self.lightning_module) or any(is_overridden(hook, c, Callback) for c in callbacks)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        assert self._parallel is not None
        if kwargs.get("inputs") is not None and self.num_data_ranks > 1:
            raise ValueError(
                f"manual_backward(..., inputs=) under layout {self.layout}: gradients of some parameters alone can't "
                "be reduced over the data ranks; freeze the others meanwhile (toggle_optimizer, requires_grad_)"
            )
        self._has_run_backward = True
        with self._trial(), self._apart():
            return super().backward(self._parallel.before_backward(closure_loss), optimizer, *args, **kwargs)

    def _after_backward(self, original: Callable[..., Tensor], *args: Any) -> Tensor:
        """Stands before the plugin's method that calls ``on_after_backward``, which sees finished gradients."""
        assert self._parallel is not None
        self._parallel.after_backward()
        return original(*args)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        if self.num_data_ranks > 1 and optimizers.reads_the_loss(optimizer):
            closure = partial(self._with_mean_loss, closure)
        assert self._parallel is not None
        self._refuse_unreduced(optimizer)
        with self._parallel.stepping(optimizer):
            return super().optimizer_step(optimizer, partial(self._hooked, closure), *args, **kwargs)

    def _refuse_unreduced(self, optimizer: Optimizer) -> None:
        """Raises where an optimizer is about to step on what the data ranks don't share.

        Raises:
            RuntimeError: gradients of a backward pass that this strategy was not told of; parameters that came to the
                module during the fit.
        """
        assert self.lightning_module is not None
        if self.num_data_ranks == 1:
            return
        held_by = [p for group in optimizer.param_groups for p in group["params"]]
        manual = isinstance(self._parallel, Replicated) and not self.lightning_module.automatic_optimization
        if manual and not self._has_run_backward and any(p.grad is not None for p in held_by):
            raise RuntimeError(
                "gradients that came by loss.backward() or torch.autograd.backward are those of this rank's samples: "
                "call self.manual_backward(loss), which averages them over the data ranks"
            )
        others = {id(p) for p in held_by} - self._known_parameters.keys()
        new = [name for name, p in self.lightning_module.named_parameters() if id(p) in others] if others else []
        if new:
            raise RuntimeError(
                f"{new[0]} came to the module after the fit had begun, and the optimizer has it: its gradient is not "
                f"reduced over the data ranks of layout {self.layout}; build it before the fit (in configure_model, "
                "frozen if need be), or go on from a checkpoint in a new fit"
            )

    def _hooked(self, run: Callable[..., Any], *args: Any) -> Any:
        """What an optimizer's step calls of Lightning's, with the user's hooks in it."""
        assert self._parallel is not None
        with self._parallel.hooked():
            return run(*args)

    def _before_step(self, original: Callable[..., None], *args: Any) -> None:
        """Stands before the plugin's method that calls ``on_before_optimizer_step``, after which an optimizer steps."""
        assert self._parallel is not None
        self._parallel.before_step_hooks()
        self._hooked(original, *args)
        self._parallel.hide_gradients()

    def _with_mean_loss(self, closure: Callable[[], Any]) -> Any:
        loss = closure()
        return self.reduce(loss.detach()) if isinstance(loss, Tensor) else loss

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        parameters = self.precision_plugin.main_params(optimizer)
        self.gradient_norm = gradients.clip_by_norm(parameters, clip_val)

    def _clip_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        gradients.clip_by_value(self.precision_plugin.main_params(optimizer), clip_val)

    def _keep_copies_equal(self) -> None:
        """At an epoch's first step, since hooks before it may have drawn random values for parameters."""
        assert self.lightning_module is not None
        epoch = self.lightning_module.trainer.current_epoch
        if self.mesh is None or self.layout is None or epoch == self._epoch_of_copies:
            return
        self._epoch_of_copies = epoch
        refuse_early_hooks(self.lightning_module, self.layout)
        parameters = held(self.lightning_module.parameters())
        shards = [p for p in parameters if self.layout.dp_shard > 1 and isinstance(p, DTensor)]
        if self.layout.num_data_ranks > 1:
            apart = {id(p) for p in shards}
            make_copies_equal((p for p in parameters if id(p) not in apart), self.mesh.data.get_group())
        if shards and self.layout.dp_replicate > 1:
            make_copies_equal(shards, self.mesh.root["dp_replicate"].get_group())

    # ------------------------------------------------------------------ between the phases

    @override
    def on_train_start(self) -> None:
        """Until here all data ranks draw the same random numbers: hooks may have initialised parameters."""
        self._part_random_streams()
        super().on_train_start()

    @override
    def on_validation_start(self) -> None:
        self._num_evaluated = 0
        self._settle()

    @override
    def on_validation_end(self) -> None:
        assert self._parallel is not None
        self._parallel.reshard()

    @override
    def on_train_end(self) -> None:
        self.on_validation_start()
        self._saves.wait()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    @override
    def teardown(self) -> None:
        try:
            self._saves.end()
        finally:
            self._teardown()
            if self.world_size > 1:
                end_run(self._groups)

    def _teardown(self) -> None:
        self._is_in_run = False
        self._leave_world_calls()
        self._forget_what_came_early()
        if self._compiled is not None:  # the run ended before it was set up
            self._compiled.put_back()
            self._compiled = None
        for loop, mode in self._inference_modes.items():
            loop.inference_mode = mode
        self._inference_modes = {}
        self._is_set_up = False
        self._leave_search()
        if self._course is not None:
            self._course.detach()
            self._course = None
        if self.lightning_module is not None and isinstance(vars(self.lightning_module).get("all_gather"), Gathering):
            del vars(self.lightning_module)["all_gather"]
        if self._logs is not None:
            self._logs.detach()
        if self._parallel is not None:
            self._parallel.reshard()
        if self._holds_shards:  # DTensors stay where their mesh is
            assert self.accelerator is not None
            self.precision_plugin.teardown()
            self.accelerator.teardown()
            self.checkpoint_io.teardown()
        else:
            super().teardown()

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self.world_size > 1:
            end_run(self._groups, exception, self.launcher)
        if self._parallel is not None:
            self._parallel.forget_step()
        self._end_saves(exception)


def _has_hooks(parameter: nn.Parameter) -> bool:
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [t.detach() for t in (*module.parameters(), *module.buffers())]


def _to_device(module: nn.Module, device: torch.device) -> None:
    """Moves what is real; what is deferred is materialised on the device later."""
    if not any(tensor.is_meta for tensor in _tensors(module)):
        module.to(device)
        return
    for child in module.modules():
        own = [*child.parameters(recurse=False), *child.buffers(recurse=False)]
        if own and not any(tensor.is_meta for tensor in own):
            for name, parameter in child.named_parameters(recurse=False):
                assert name
                parameter.data = parameter.data.to(device)
            for name, buffer in child.named_buffers(recurse=False):
                child._buffers[name] = buffer.to(device)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
    return value
