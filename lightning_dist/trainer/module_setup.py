"""The set-up of the user's module: from what the user built to what runs its steps over the layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_dist import validation
from lightning_dist.collectives import broadcast_tensors, gather_objects
from lightning_dist.compat import lightning as private
from lightning_dist.divided.copies import copies_of, divide_copies
from lightning_dist.explain import plan_report
from lightning_dist.initialization import CannotDefer, RecordedInit, record_initialization
from lightning_dist.initialization.install import keep_shard
from lightning_dist.layout import MESH_AXES, Layout
from lightning_dist.module_layout import ModuleOptions, apply_layout
from lightning_dist.parallel import FSDPRunner, average_buffers, pipeline, validate_blocks
from lightning_dist.parallel.pipeline import PartitionedModule, PipelineRunner, partition_of
from lightning_dist.parallel.placing import all_but_parameters_to_device, to_device
from lightning_dist.parallel.replaced import give_back, whole_tensors
from lightning_dist.patches import Patches
from lightning_dist.placeholder import is_placeholder
from lightning_dist.plans.tensor import ShardingPlan, parameter_splits
from lightning_dist.precision import shard_policy
from lightning_dist.ranks import LayoutRanks, resolve
from lightning_dist.report import LayoutReport, PipelineReport, ShardingPlanReport

_UNFINISHED: WeakKeyDictionary[nn.Module, RecordedInit] = WeakKeyDictionary()
"""How modules are to be initialised that a run has built; where it was refused then, the next one does it."""


class ModuleSetup:
    """Builds the user's module over the layout, and knows what was done to it."""

    def __init__(self, ranks: LayoutRanks, options: ModuleOptions) -> None:
        self.options = options
        self.runner: Any = None
        """The :class:`SingleProcessRunner` of the module's steps, from its set-up until it is given back."""
        self.sharding_plan: ShardingPlan | None = None
        """What ``tp`` divides, once the module has been set up."""
        self.sharded_units: list[str] = []
        self.recomputed_blocks: list[str] = []
        """Names of the modules that are sharded one by one, and of those that compute their forward again."""
        self.reason = ""
        """Why ``"auto"`` chose the layout; empty where the user did."""
        self.names_of_parts: dict[Tensor, str] = {}
        """The names of parameters that the optimizers of the last fit hold parts of, once the module is given back."""
        self.known_parameters: dict[int, nn.Parameter] = {}
        """Those of the module when the run began, by id; held, so that an id is not used again."""
        self.patches = Patches()
        """What is put onto the module, for as long as it is divided."""
        self._ranks = ranks
        self._module: pl.LightningModule | None = None
        self._originals: dict[str, nn.Parameter] | None = None
        """The user's own parameters, by name, while parts are in their place; None where the module stays divided."""
        self._recorded: RecordedInit | None = None

    @property
    def _pipeline_runner(self) -> PipelineRunner | None:
        return self.runner if isinstance(self.runner, PipelineRunner) else None

    @property
    def stage(self) -> Any:
        """Where this rank lies in the pipeline; None without one."""
        return None if self._pipeline_runner is None else self._pipeline_runner.place

    def validate(self, module: pl.LightningModule) -> None:
        """Raises a ValueError, before process groups form, where the layout does not fit options or a known network."""
        if self._ranks.layout is not None:
            self.options.pipeline.validate(self._ranks.layout.pp)
        if (
            is_overridden("configure_model", module)
            or is_overridden("setup", module)
            or validation.has_lazy_parameters(module)
        ):
            return
        self._plan(module)
        if module.trainer.state.fn == TrainerFn.FITTING and self.options.recomputes:
            validate_blocks(module, self.options.blocks(module), self.options.activation_checkpointing)

    def _plan(self, module: pl.LightningModule) -> ShardingPlan | None:
        layout, options = self._ranks.layout, self.options
        return None if layout is None else options.tensor.sharding_plan(module, layout.tp, options.blocks(module))

    @contextmanager
    def deferring(self, module: pl.LightningModule) -> Iterator[None]:
        """While it lasts, what ``configure_model`` builds is deferred if the layout shards; see ``initialization``."""
        layout, earlier = self._ranks.layout, _UNFINISHED.pop(module, None)
        if self._ranks.world_size == 1 or (layout is not None and not layout.holds_shards):
            yield
            self._recorded = earlier if earlier is not None and earlier.has_all_of(module) else None
            return
        try:
            with record_initialization() as self._recorded:
                yield
        except CannotDefer as error:
            rank_zero_warn(f"{error} It is now built whole on every rank before it is sharded.")
            self._recorded = None
            module.configure_model()
            validation.validate_built(module)
        else:
            try:
                self._recorded.bind(module)
            except CannotDefer:
                if earlier is None or not earlier.has_all_of(module):
                    raise
                self._recorded = earlier
        if self._recorded is not None and self._recorded.names:
            _UNFINISHED[module] = self._recorded

    def _materialize(self, module: pl.LightningModule) -> None:
        """Gives what ``configure_model`` deferred the values of plain building; a rank keeps its part."""
        if self._recorded is not None and self._recorded.names:
            host = torch.device("cpu") if self.options.cpu_offload else None
            take = partial(keep_shard, device=self._ranks.device, of_shards=host)
            self._recorded.materialize(module, take)
        self._recorded = None
        _UNFINISHED.pop(module, None)

    def build(self, module: pl.LightningModule, precision: Precision, training: bool) -> None:
        """Applies the layout to the module, as hooks left it, in place; what an earlier run did to it stays.

        Communication: the parameters' and buffers' bytes from rank 0 where it was built whole, and see
        :func:`~lightning_dist.parallel.parallelize`.

        Raises:
            ValueError: the layout does not fit the module.
        """
        self._module = module
        if self._ranks.world_size > 1:
            validation.validate_no_lazy(module)
        if partition_of(module) is None:  # else its ranks hold different parameters by now
            precision.convert_module(module)
        layout, reason = self._ranks.decide(module)
        if reason:
            self.reason = reason
            private.show_mesh(module, None if self._ranks.mesh is None else self._ranks.mesh.root)
            validation.validate_trainer(module.trainer, layout, self._ranks.device)
            self.options.shards.validate(layout)
        self._validate_mesh(module, layout)
        self.sharding_plan = plan = self._plan(module)
        validation.validate_parameter_kinds(module, layout, parameter_splits(plan.tensor_plan) if plan else ())
        if self.is_divided(module):
            validation.validate_no_new_parameters(module, self.known_parameters)
        else:
            (all_but_parameters_to_device if layout.holds_shards else to_device)(module, self._ranks.device)
            if self._ranks.world_size > 1 and not (training and not layout.holds_shards):
                broadcast_tensors([t for t in _tensors(module) if not t.is_meta], None, device=self._ranks.device)
        if not layout.holds_shards:
            self._materialize(module)
        self.runner = self._apply(module, layout, precision, training)
        self.known_parameters = {id(p): p for p in module.parameters()}
        by_data = self.runner if self._pipeline_runner is None else self._pipeline_runner.inner
        self.sharded_units = list(by_data.units) if isinstance(by_data, FSDPRunner) else []

    def _apply(self, module: pl.LightningModule, layout: Layout, precision: Precision, training: bool) -> Any:
        is_fresh = not self.is_divided(module)
        is_deferred = self._recorded is not None and bool(self._recorded.names)
        blocks, policy = self.options.blocks(module), shard_policy(precision, self._ranks.device)
        self.recomputed_blocks = list(blocks) if training and self.options.recomputes else []
        runner, originals = apply_layout(
            module,
            self._ranks,
            self.options,
            blocks,
            self.sharding_plan,
            policy,
            self.patches,
            _owners(module.trainer),
            training=training,
            partition=partial(self._partition, module, layout, list(blocks), policy.param_dtype),
            materialize=partial(self._materialize, module),
        )
        if is_fresh:
            self._originals = None if is_deferred else originals
        divide_copies(module.trainer.callbacks, module)  # type: ignore[attr-defined]
        return runner

    def _partition(
        self, module: pl.LightningModule, layout: Layout, blocks: list[str], dtype: torch.dtype | None
    ) -> PartitionedModule | None:
        """Leaves this rank the stages of the pipeline that are its own."""
        mesh = self._ranks.mesh
        if mesh is None or layout.pp == 1:
            return None
        if self._recorded is not None and any(buffer.is_meta for buffer in module.buffers()):
            # what depends on no parameter is traced for real
            self._recorded.materialize(module, device=self._ranks.device, parameters=False)
        return pipeline.partition_module(
            module,
            module.trainer,
            self.options.pipeline,
            mesh.root["pp"].get_group(),
            blocks,
            undivided=[] if self.sharding_plan is None else list(self.sharding_plan.tensor_plan),
            patches=self.patches,
            keep_whole=self.options.keeps_blocks_whole(layout),
            device=self._ranks.device,
            dtype=dtype if layout.dp_shard > 1 else None,
        )

    def _validate_mesh(self, module: pl.LightningModule, layout: Layout) -> None:
        cut, mesh = partition_of(module), self._ranks.mesh
        if cut is not None:
            cut.validate_same(0 if mesh is None else mesh.root["pp"].get_local_rank(), layout.pp)
        mine = {} if mesh is None else dict(zip(MESH_AXES, mesh.root.shape, strict=True))
        of_earlier = next((p.device_mesh for p in module.parameters() if isinstance(p, DTensor)), None)
        axes = () if of_earlier is None else zip(of_earlier.mesh_dim_names or (), of_earlier.shape, strict=False)
        if any(mine.get(axis) != size for axis, size in axes):
            raise ValueError(
                f"this module is sharded over {of_earlier} from an earlier run, and the layout is now {layout}; build "
                "the module anew and pass ckpt_path= to go on from its checkpoint"
            )

    def share_buffers(self) -> None:
        """Makes the module's buffers equal on all ranks before they are used or saved, those of averages of it too.

        Communication: see :func:`~lightning_dist.parallel.average_buffers`; none for one process. Raises what is wrong
        with the steps so far, see :meth:`~lightning_dist.parallel.SingleProcessRunner.validate_steps`.
        """
        if self.runner is not None:
            self.runner.validate_steps()
        group, module = self._ranks.data_group, self._module
        if group is None or module is None:
            return
        trainer = private.trainer_of(module)
        for one in (module, *copies_of(module, [] if trainer is None else trainer.callbacks)):
            average_buffers(one, group)
        if self.runner is not None:
            self.runner.share_buffers()

    def reshard(self) -> None:
        """Frees what was gathered for a forward pass that no backward followed. Communication: none."""
        if self.runner is not None:
            self.runner.reshard()

    def validate_optimizer(self, optimizer: Optimizer) -> None:
        """Raises a ValueError for an optimizer of an earlier run that nobody holds who was given the new parameters."""
        old = {id(p): name for name, p in (self._originals or {}).items()}
        lost = [old[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in old]
        if lost:
            raise ValueError(
                f"{type(optimizer).__name__} of an earlier run holds {lost[0]}, which the layout divides anew, and "
                "would never train it: make it in configure_optimizers, and pass ckpt_path= to go on"
            )

    @property
    def gives_back(self) -> bool:
        """Whether this run has put parts into the module, in place of what the user had built whole."""
        return self._originals is not None

    def give_back(self) -> None:
        """Makes the module what the user built, with the trained values, whole and on the CPU.

        What ``configure_model`` built deferred may be too large for that: it stays divided, for later runs too. The
        optimizers of the run keep their parts.

        Communication: each divided parameter's and buffer's bytes, over the axes that divide it, and over the pipeline
        those of all stages; none where nothing is divided.
        """
        module, originals, self._originals = self._module, self._originals, None
        if module is None or originals is None:
            return
        named = module.named_parameters()
        self.names_of_parts = {p: name for name, p in named if isinstance(p, DTensor) or is_placeholder(p)}
        whole = whole_tensors(module)
        if (runner := self._pipeline_runner) is not None:
            whole = pipeline.whole_of_all_stages(module, whole, runner.stages, runner.group, self._ranks.device)
        self.runner, self.known_parameters = None, {}
        self.patches.undo()
        give_back(module, whole, originals, _owners(module.trainer), self._kept_alike)

    def _kept_alike(self, kept: dict[str, Any]) -> list[str]:
        """What all ranks keep, of what callbacks do. One all-gather of names and shapes, where there are parts."""
        others = gather_objects(kept) if self._ranks.holds_shards else []
        return [name for name, parts in kept.items() if all(other.get(name) == parts for other in others)]

    def move_to_cpu(self) -> None:
        """Where it is whole again; as Lightning's strategies leave a module. What a refusal kept from being set up has
        no values yet, and stays.
        """
        module = self._module
        if (
            module is None
            or self.is_divided(module)
            or any(t.is_meta for t in (*module.parameters(), *module.buffers()))
        ):
            return
        module.cpu()

    @staticmethod
    def is_divided(module: nn.Module) -> bool:
        """Whether a rank holds parts of the module's parameters, or some of them only."""
        return partition_of(module) is not None or any(isinstance(p, DTensor) for p in module.parameters())

    def report(self, module: pl.LightningModule) -> LayoutReport:
        """What was done to the module."""
        layout, plan, runner = self._ranks.layout, self.sharding_plan, self._pipeline_runner
        assert layout is not None
        return LayoutReport.of(
            module,
            layout,
            sharding_plan=None if plan is None else ShardingPlanReport.of(module, plan, layout),
            reason=self.reason,
            units=self.sharded_units,
            recomputed=self.recomputed_blocks,
            checkpointing=self.options.activation_checkpointing,
            pipeline=None if runner is None else PipelineReport.of(module, runner.stages, self.options.pipeline),
        )

    def explain(self, module: pl.LightningModule, num_ranks: int, batch: Any = None) -> LayoutReport:
        """What would be done to a module on so many ranks, without processes; see ``HybridStrategy.explain``."""
        requested, options = self._ranks.requested, self.options
        return plan_report(
            module,
            num_ranks,
            None if requested is None else resolve(requested, num_ranks),
            options.blocks(module),
            options.tensor,
            options.pipeline,
            options.keeps_blocks_whole,
            options.activation_checkpointing,
            batch,
            options.shards,
        )


def _owners(trainer: Any) -> list[object]:
    """Who may have collected parameters of the module before it was divided."""
    return [*trainer.callbacks, *filter(None, [trainer.datamodule])]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [t.detach() for t in (*module.parameters(), *module.buffers())]
