"""HybridFabricStrategy: Fabric's hooks; each calls the room where the work is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial, wraps
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.accelerators import Accelerator
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment, Precision, TorchCheckpointIO
from lightning.fabric.strategies import ParallelStrategy
from lightning.fabric.strategies.strategy import Strategy, TBroadcast
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_dist import checkpoint as checkpoints
from lightning_dist import collectives, gradients, optimizers
from lightning_dist.compat import fabric as private
from lightning_dist.compat.lightning import Path
from lightning_dist.fabric import checkpoint as files
from lightning_dist.fabric.loaders import Injected, seed_workers, shard_injected
from lightning_dist.fabric.module import InLayout, bare, frame_of_setup, named_tensors, set_up
from lightning_dist.gathering import all_gather
from lightning_dist.layout import Layout
from lightning_dist.module_layout import ModuleOptions, ShardUnits, compile_options, one_of
from lightning_dist.parallel import Checkpointing
from lightning_dist.parallel.placing import all_but_parameters_to_device, to_device
from lightning_dist.patches import Patches
from lightning_dist.plans.tensor import Styles, TensorOptions
from lightning_dist.precision import make_agreeing
from lightning_dist.ranks import LayoutRanks, shown_of_ranks
from lightning_dist.validation import validate_lbfgs


@private.fabric_hooks
class HybridFabricStrategy(ParallelStrategy):
    """Runs a loop that a user writes with Fabric over a layout of data, shard and tensor parallelism.

    The loop, the modules and the optimizers stay as they are: ``fabric.setup``, ``fabric.backward``,
    ``fabric.clip_gradients``, ``fabric.no_backward_sync``, ``fabric.save`` and ``fabric.load`` do what they do in one
    process. Optimizers may be made before or after the module is set up.

    Args:
        layout: degrees of ``dp_replicate``, ``dp_shard`` and ``tp``, or ``"auto"``, which the first module that is set
            up decides.
        compile: as of :class:`~lightning_dist.HybridStrategy`; a module that the user compiled is compiled so, too.
        checkpoint_format: ``"single"``, one file as plain Fabric writes it; ``"sharded"``, a directory to which every
            rank writes what it holds; ``"auto"``, sharded where parameters are.
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision: Fabric sets them.

        The others are those of :class:`~lightning_dist.HybridStrategy`.

    Raises:
        ValueError: see :class:`~lightning_dist.Layout`; and for ``pp``, which has to run the whole step itself.

    What is communicated: see the runners in :mod:`lightning_dist.parallel` for a step,
    :class:`~lightning_dist.fabric.module.InLayout` for a forward, :func:`~lightning_dist.gradients.global_norm` for
    clipping.
    """

    strategy_name = "hybrid"

    def __init__(
        self,
        layout: Layout | Mapping[str, int] | str = "auto",
        *,
        shard_units: ShardUnits | None = None,
        reshard_after_forward: bool = True,
        max_unit_parameters: int | None = None,
        prefetch_units: int = 1,
        tensor_plan: Styles | None = None,
        sequence_parallel: bool = False,
        activation_checkpointing: Checkpointing = "none",
        compile: bool | Mapping[str, Any] = False,
        checkpoint_format: Literal["auto", "single", "sharded"] = "auto",
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(accelerator, parallel_devices, cluster_environment, checkpoint_io, precision)
        self.start_method = one_of("start_method", start_method, "popen", "spawn", "fork", "forkserver")
        self.num_nodes = 1
        self.ranks = LayoutRanks(Layout.parse(layout), process_group_backend, timeout)
        _validate_no_pipeline(self.ranks.requested)
        self.checkpoint_format = one_of("checkpoint_format", checkpoint_format, "auto", "single", "sharded")
        self.sync_control = _SyncControl()
        self._patches = Patches()
        tensor = TensorOptions(tensor_plan, sequence_parallel)
        self._options = ModuleOptions(
            shard_units,
            tensor,
            activation_checkpointing,
            compile_options(compile),
            reshard_after_forward=reshard_after_forward,
            max_unit_parameters=max_unit_parameters,
            prefetch_units=prefetch_units,
        )
        self._in_play: list[InLayout] = []
        """See [Note: which modules take part in a backward pass]."""

    layout, mesh, num_data_ranks, num_processes, data_rank, data_group = shown_of_ranks

    def __repr__(self) -> str:
        """What a Trainer shows when it is given one."""
        return f"<{type(self).__name__}, for Fabric; for a Trainer there is HybridStrategy>"

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    def set_world_ranks(self) -> None:
        """Called by Fabric as soon as devices and nodes are known: the layout is checked here."""
        assert self.cluster_environment is not None
        assert self.parallel_devices is not None
        self.ranks.place(self.cluster_environment, self.parallel_devices, self.num_nodes)
        _validate_no_pipeline(self.layout)

    def launcher_of_processes(self) -> Any:
        """Starts the other processes; None where they are there."""
        assert self.cluster_environment is not None
        if self.cluster_environment.creates_processes_externally or self.ranks.world_size == 1:
            return None
        return private.launcher(self, self.start_method)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self.set_world_ranks()
        assert self.cluster_environment is not None
        self.ranks.join(self.cluster_environment)
        self.ranks.form_mesh()
        if self.world_size > 1:
            make_agreeing(self.precision, self._patches)

    def _group(self, group: Any) -> dist.ProcessGroup | None:
        if self.mesh is None and self.world_size > 1:  # "auto", of which all ranks are data ranks
            return group if group is not None else dist.group.WORLD
        return self.ranks.group_unless(group)

    @override
    def all_reduce(self, tensor: Any, group: Any = None, reduce_op: dist.ReduceOp | str | None = "mean") -> Any:
        """Over the ranks with different samples, unless another group than the world is given. One all-reduce.

        As Fabric says, the tensor itself is given the result, but for the mean of integers, which is another one in
        float64.
        """
        group = self._group(group)
        if not isinstance(tensor, Tensor) or group is None:
            return tensor
        result = collectives.reduce_tensor(tensor.detach(), group, reduce_op)
        if result.dtype != tensor.dtype:
            return result
        with torch.no_grad():
            return tensor.copy_(result)

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """From the ranks with different samples, in the order of data ranks, unless another group is given."""
        group = self._group(group)
        return tensor if group is None else all_gather(tensor, group, sync_grads)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return collectives.reduce_decision(decision, all, self.root_device)

    @override
    def barrier(self, name: str | None = None) -> None:
        collectives.barrier(self.root_device)

    @override
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        return collectives.broadcast_object(obj, src)

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        """None for one data rank: the user's own sampler stays, which all ranks of ``tp`` draw alike from."""
        if self.num_data_ranks == 1:
            return None
        return {"num_replicas": self.num_data_ranks, "rank": self.data_rank, "seed": Injected.of_environment()}

    @override
    def process_dataloader(self, dataloader: DataLoader) -> DataLoader:
        if self.num_data_ranks > 1:
            shard_injected(dataloader, self.num_data_ranks, self.data_rank)
        seed_workers(dataloader, self.global_rank, self.data_rank)
        return dataloader

    @override
    def module_to_device(self, module: nn.Module) -> None:
        meta = next((name for name, tensor in named_tensors(module) if tensor.is_meta), None)
        if meta is not None:
            raise ValueError(
                f"{meta} is on the meta device, and nothing says what its values are: build the module without "
                'torch.device("meta"), under fabric.init_module() if you like'
            )
        divides = self.world_size > 1 and (self.layout is None or self.layout.holds_shards)
        waits = divides and frame_of_setup() is not None
        (all_but_parameters_to_device if waits else to_device)(module, self.root_device)

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:
        """Divides, or replicates, the module in place. All ranks call it, and go on with rank 0's values."""
        return self.setup_module_and_optimizers(module, [])[0]

    @override
    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """The optimizers, made before, are given the divided parameters."""
        takes_part = self._takes_part
        module = set_up(module, self.ranks, self._options, self.precision, optimizers, self._patches, takes_part)
        return module, [self.setup_optimizer(optimizer) for optimizer in optimizers], scheduler

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Settles how it steps, and tries whether it may step over divided parameters.

        Communication: see :func:`lightning_dist.optimizers.validate_exact`, where the layout divides.
        """
        if self.mesh is None:
            return optimizer
        assert self.layout is not None
        validate_lbfgs(optimizer)
        if self.layout.holds_shards:
            optimizers.step_over_local_parts(optimizer, self._patches)
            optimizers.validate_exact(optimizer, self.layout, self.root_device)
        # a forward pass without a backward leaves a root gathered: the step must not go on beside the gathered copy
        optimizer.register_step_pre_hook(lambda *_: self._reshard())
        return optimizer

    def _takes_part(self, module: InLayout) -> None:
        self._in_play = [one for one in self._in_play if not one.is_stepped or one is module]
        module.is_stepped = False
        if not any(module is one for one in self._in_play):
            self._in_play.append(module)

    def _reshard(self) -> None:
        for module in self._in_play:
            module.parallel.reshard()

    # Where a strategy overrides ``backward``, Fabric refuses torch.autograd.grad of what a module returned, too; not
    # where a method wraps the original (Lightning 2.6.6). Other ways than fabric.backward: see _finish_gradients.
    @wraps(Strategy.backward)
    def backward(  # type: ignore[override]
        self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any
    ) -> None:
        """Reduces the gradients of all modules that take part, unless they are under ``no_backward_sync``."""
        taking_part = list(self._in_play)
        if kwargs.get("inputs") is not None and self.num_data_ranks > 1:
            raise ValueError(
                f"fabric.backward(..., inputs=) under layout {self.layout}: gradients of some parameters alone can't "
                "be reduced over the data ranks; freeze the others meanwhile (requires_grad_)"
            )
        for one in taking_part:
            tensor = one.parallel.before_backward(tensor)
        super().backward(tensor, module, *args, **kwargs)
        for one in taking_part:
            one.after_backward()

    def _finish_gradients(self, optimizer: Optimizer) -> None:
        """Before anything looks at them: reduces what was only added up so far.

        Raises:
            RuntimeError: gradients came by other ways than ``fabric.backward``.
        """
        modules = [one for one in self._in_play if one.is_trained_by(optimizer)]
        for one in modules:
            one.reduce_held()
        has_gradients = any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        if has_gradients and not all(one.had_backward for one in modules):
            raise RuntimeError(
                "gradients that came by loss.backward() or torch.autograd.backward are those of this rank's samples: "
                "call fabric.backward(loss), which reduces them over the ranks"
            )

    @override
    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        closure = kwargs.get("closure")
        if closure is None:
            self._finish_gradients(optimizer)
        elif self.num_data_ranks > 1 and optimizers.reads_the_loss(optimizer):
            kwargs["closure"] = partial(self._with_mean_loss, closure)
        output = super().optimizer_step(optimizer, **kwargs)
        for one in self._in_play:
            if one.is_trained_by(optimizer, all_of_it=True):
                one.had_backward, one.is_stepped = False, True
        return output

    def _with_mean_loss(self, closure: Callable[[], Any]) -> Any:
        loss = closure()
        return self.all_reduce(loss.detach().clone()) if isinstance(loss, Tensor) else loss

    @override
    def clip_gradients_norm(
        self, module: Any, optimizer: Optimizer, max_norm: Any, norm_type: float = 2.0, error_if_nonfinite: bool = True
    ) -> Tensor:
        """The norm before clipping. Communication: see :func:`~lightning_dist.gradients.global_norm`."""
        return gradients.clip_by_norm(self._unscaled(optimizer), max_norm, float(norm_type), error_if_nonfinite)

    @override
    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float | int) -> None:
        """Communication: none."""
        gradients.clip_by_value(self._unscaled(optimizer), clip_val)

    def _unscaled(self, optimizer: Optimizer) -> Iterable[Tensor]:
        self._finish_gradients(optimizer)
        self.precision.unscale_gradients(optimizer)
        return self.precision.main_params(optimizer)

    @property
    def saves_shards(self) -> bool:
        """Whether a checkpoint is a directory to which every rank writes what it holds."""
        divides = self.ranks.holds_shards and self.mesh is not None
        return self.checkpoint_format == "sharded" or (self.checkpoint_format == "auto" and divides)

    @override
    def save_checkpoint(
        self, path: Path, state: dict[str, Any], storage_options: Any = None, filter: files.Filter | None = None
    ) -> None:
        """Every rank calls it. See :func:`lightning_dist.fabric.checkpoint.save`."""
        for module in state.values():
            if isinstance(module, InLayout):
                module.settle()
        write = None
        if storage_options is not None or type(self.checkpoint_io) is not TorchCheckpointIO:
            write = partial(self.checkpoint_io.save_checkpoint, storage_options=storage_options)
        files.save(path, state, filter or {}, self.saves_shards, write)

    @override
    def load_checkpoint(
        self,
        path: Path,
        state: nn.Module | Optimizer | dict[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Every rank calls it. See :func:`lightning_dist.fabric.checkpoint.load`."""
        if isinstance(state, (nn.Module, Optimizer)):
            files.load_raw(path, state, strict, weights_only)
            return {}
        return files.load(path, {} if state is None else state, strict, weights_only)

    @override
    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        return checkpoints.model_state(bare(module))

    @override
    def load_module_state_dict(self, module: nn.Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        checkpoints.load_model_state(bare(module), state_dict, strict)


class _SyncControl(private.BackwardSyncControl):
    @override
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """While it lasts, backward passes add to the gradients of the module without reducing them."""
        return module.parallel.accumulating() if enabled and isinstance(module, InLayout) else nullcontext()


def _validate_no_pipeline(layout: Layout | None) -> None:
    if layout is not None and layout.pp > 1:
        raise ValueError(
            f"layout {layout} asks for pp={layout.pp} under Fabric: a pipeline has to run the whole training step "
            "itself, microbatch by microbatch, and here the loop is the user's; use HybridStrategy with a Trainer for "
            "pp, or dp_replicate, dp_shard and tp"
        )
