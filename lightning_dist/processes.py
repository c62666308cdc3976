"""The ranks of a layout: how they start, who sees which samples, and how they talk."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import (
    _distributed_is_initialized,
    _get_default_process_group_backend_for_device,
)
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.strategies.strategy import TBroadcast
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from typing_extensions import override

from lightning_dist import ranks
from lightning_dist.checkpoint import StageRanks, gather_state, model_state
from lightning_dist.elastic.guard import begin_run
from lightning_dist.gathering import all_gather, validate_even
from lightning_dist.layout import Layout, ParallelMesh
from lightning_dist.patches import Patches
from lightning_dist.world_calls import WorldCalls


class LayoutRanks(ParallelStrategy):
    """The part of a strategy that does not know the model: processes, process groups, collectives.

    Args:
        requested: the user's layout; None for ``"auto"``, which a subclass decides.
        start_method: how the other processes of a script start.
        process_group_backend: of torch.distributed; None for that of the device.
        timeout: of collectives.
        **plugins: as for Lightning's strategies.
    """

    def __init__(
        self,
        requested: Layout | None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"],
        process_group_backend: str | None,
        timeout: timedelta,
        **plugins: Any,
    ) -> None:
        self._world_calls: WorldCalls | None = None
        """Where several ranks see the same samples, while the strategy is set up."""
        super().__init__(**plugins)
        self.requested = requested
        self.layout: Layout | None = None
        """Resolved; None while ``"auto"`` is undecided."""
        self.mesh: ParallelMesh | None = None
        """None for one process."""
        self.num_nodes = 1
        self._is_set_up = False
        self._start_method = start_method
        self._process_group_backend = process_group_backend
        self._timeout = timeout

    def __repr__(self) -> str:
        """What Fabric shows when it is given one."""
        return f"<{type(self).__name__}, for a Trainer; for Fabric there is HybridFabricStrategy>"

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
        if self._world_calls is not None:
            self._world_calls.note_place("global_rank")
        return super().global_rank

    @property
    @override
    def world_size(self) -> int:
        if self._world_calls is not None:
            self._world_calls.note_place("world_size")
        return super().world_size

    @property
    def num_processes(self) -> int:
        """Processes of this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def process_group_backend(self) -> str:
        """Backend of torch.distributed."""
        return self._process_group_backend or _get_default_process_group_backend_for_device(self.root_device)

    def set_world_ranks(self) -> None:
        """Called by the Trainer as soon as devices and nodes are known: the layout is checked here."""
        assert self.cluster_environment is not None
        self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        rank_zero_only.rank = fabric_rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]
        if self.requested is not None:
            self.layout = self._resolve(self.requested, self.world_size)

    @staticmethod
    def _resolve(requested: Layout, num_ranks: int) -> Layout:
        return ranks.resolve(requested, num_ranks)

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self.cluster_environment.creates_processes_externally or self.num_processes * self.num_nodes == 1:
            return
        if self._start_method == "popen":
            self._launcher = _SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = _GatheringLauncher(self, start_method=self._start_method)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self.set_world_ranks()
        if self.world_size > 1:
            is_new = not _distributed_is_initialized()
            assert self.cluster_environment is not None
            ranks.join_world(self.cluster_environment, self.process_group_backend, self._timeout, self.root_device)
            if is_new:
                begin_run()
        if self.layout is not None:
            self._build_mesh()

    def _build_mesh(self) -> None:
        assert self.layout is not None
        assert self.lightning_module is not None
        if self.world_size > 1 and self.mesh is None:
            self.mesh = self.layout.build_mesh(self.root_device.type)
        self.lightning_module._device_mesh = None if self.mesh is None else self.mesh.root

    def _part_random_streams(self) -> None:
        """Data ranks draw apart from here on."""
        ranks.part_random_streams(self.data_rank)

    @property
    def num_data_ranks(self) -> int:
        """Number of ranks, or groups of ranks, that see different samples."""
        return self.world_size if self.layout is None else self.layout.num_data_ranks

    @property
    def data_rank(self) -> int:
        """Which of the data ranks this is; ranks with the same one see the same samples."""
        return self.global_rank if self.mesh is None else self.mesh.data.get_local_rank()

    @property
    def _groups(self) -> dict[str, dist.ProcessGroup]:
        """All of the layout, by a name that is the same on the ranks of each."""
        if not _distributed_is_initialized():
            return {}
        groups: dict[str, dist.ProcessGroup] = {"world": dist.distributed_c10d._get_default_group()}
        if self.mesh is not None:
            meshes = {axis: self.mesh.root[axis] for axis in self.mesh.root.mesh_dim_names or ()}
            for name, mesh in {**meshes, "data": self.mesh.data, "logs": self.mesh.logs}.items():
                group = mesh.get_group()
                groups[f"{name} {dist.get_process_group_ranks(group)}"] = group
        return groups

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold different samples; None for one process."""
        return None if self.mesh is None else self.mesh.data.get_group()

    @property
    def logs_group(self) -> dist.ProcessGroup | None:
        """The ranks that log different values: of other samples or other stages; None for one process."""
        return None if self.mesh is None else self.mesh.logs.get_group()

    def _look_at_world_calls(self, patches: Patches) -> None:
        """From here on, until :meth:`_leave_world_calls`, a user's own collectives over the world are looked at."""
        self._leave_world_calls()
        if self.layout is not None and self.world_size > self.num_data_ranks:
            self._world_calls = WorldCalls(self.layout)
            self._world_calls.attach(patches)

    def _leave_world_calls(self) -> None:
        self._world_calls = None

    @property
    def stage_ranks(self) -> StageRanks | None:
        """The ranks that hold the stages of a pipeline, from this rank's view; None without one."""
        if self.mesh is None or self.layout is None or self.layout.pp == 1:
            return None
        place = self.layout.coordinates(self.global_rank)
        writes = not any(index for axis, index in place.items() if axis != "pp")
        return StageRanks(self.mesh.root["pp"].get_group(), writes, self.root_device)

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.num_data_ranks, "rank": self.data_rank}

    @override
    def reduce(
        self, tensor: Tensor | Any, group: Any | None = None, reduce_op: dist.ReduceOp | str | None = "mean"
    ) -> Tensor | Any:
        """Over the ranks with different samples, unless another group than the world is given. One all-reduce."""
        group = ranks.data_group_unless(group, self.data_group)
        if not isinstance(tensor, Tensor) or group is None:
            return tensor
        return ranks.reduce_over(tensor, group, reduce_op)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """The same decision on every rank. One all-reduce of one number over the world."""
        return ranks.decide_together(decision, all, self.root_device)

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
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
            (data ranks, *shape) in the order of :attr:`data_rank`; in one process the tensor as it is.
        """
        group = ranks.data_group_unless(group, self.data_group)
        if self._world_calls is not None:
            self._world_calls.note_gather()
        if group is not None and self.lightning_module is not None and self.lightning_module.trainer.state.finished:
            validate_even(tensor, group)  # rows that an evaluation left; its own all_gather is gone with it
        return tensor if group is None else all_gather(tensor, group, sync_grads)

    @override
    def barrier(self, name: str | None = None) -> None:
        ranks.barrier(self.root_device)

    @override
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        return ranks.broadcast(obj, src)


class _GatheringLauncher(_MultiProcessingLauncher):
    """Lightning's launcher by multiprocessing; the main process, which is no rank, gets whole weights, not shards."""

    @override
    def _collect_rank_zero_results(self, trainer: pl.Trainer, results: Any) -> Any:
        module: Any = trainer.lightning_module
        strategy: Any = trainer.strategy
        state = gather_state(model_state(module), strategy.stage_ranks)
        module.state_dict = lambda: state
        try:
            return super()._collect_rank_zero_results(trainer, results)
        finally:
            del module.state_dict
