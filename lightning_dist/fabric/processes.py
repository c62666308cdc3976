"""The ranks of a layout under Fabric: how they start, and how they talk."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.strategies import ParallelStrategy
from lightning.fabric.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.fabric.strategies.strategy import TBroadcast
from lightning.fabric.utilities.distributed import _get_default_process_group_backend_for_device
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_only as utilities_rank_zero_only
from torch import Tensor
from typing_extensions import override

from lightning_dist import collectives, ranks
from lightning_dist.gathering import all_gather
from lightning_dist.layout import Layout, ParallelMesh

StartMethod = Literal["popen", "spawn", "fork", "forkserver"]


class FabricRanks(ParallelStrategy):
    """The part of a strategy of Fabric that does not know the model; as :class:`~lightning_dist.processes.LayoutRanks`
    of the Trainer's.

    Args:
        requested: the user's layout; None for ``"auto"``, which a subclass decides.
        start_method: how the other processes start.
        process_group_backend: of torch.distributed; None for that of the device.
        timeout: of collectives.
        **plugins: as for Fabric's strategies.

    Raises:
        ValueError: for ``pp``, which has to run the whole step itself.
    """

    def __init__(
        self,
        requested: Layout | None,
        start_method: StartMethod,
        process_group_backend: str | None,
        timeout: timedelta,
        **plugins: Any,
    ) -> None:
        super().__init__(**plugins)
        if requested is not None:
            _refuse_pipeline(requested)
        self.requested = requested
        self.layout: Layout | None = None
        """Resolved; None while ``"auto"`` is undecided."""
        self.mesh: ParallelMesh | None = None
        """None for one process."""
        self._num_nodes = 1
        self._start_method = start_method
        self._process_group_backend = process_group_backend
        self._timeout = timeout

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_nodes(self) -> int:
        """Machines of the run; Fabric sets ``_num_nodes`` (seen in 2.6.6)."""
        return self._num_nodes

    @property
    def num_processes(self) -> int:
        """Processes of this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def process_group_backend(self) -> str:
        """Backend of torch.distributed."""
        return self._process_group_backend or _get_default_process_group_backend_for_device(self.root_device)

    def _set_world_ranks(self) -> None:
        """Called by Fabric as soon as devices and nodes are known: the layout is checked here."""
        assert self.cluster_environment is not None
        self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = utilities_rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]
        if self.requested is not None:
            self.layout = ranks.resolve(self.requested, self.world_size)
            _refuse_pipeline(self.layout)

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self.cluster_environment.creates_processes_externally or self.num_processes * self.num_nodes == 1:
            return
        if self._start_method == "popen":
            self._launcher = _SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = _MultiProcessingLauncher(self, start_method=self._start_method)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self._set_world_ranks()
        if self.world_size > 1:
            assert self.cluster_environment is not None
            ranks.join_world(self.cluster_environment, self.process_group_backend, self._timeout, self.root_device)
        self._build_mesh()

    def _build_mesh(self) -> None:
        if self.layout is not None and self.world_size > 1 and self.mesh is None:
            self.mesh = self.layout.build_mesh(self.root_device.type)

    @property
    def num_data_ranks(self) -> int:
        """Number of ranks, or groups of ranks, that see different samples."""
        return self.world_size if self.layout is None else self.layout.num_data_ranks

    @property
    def data_rank(self) -> int:
        """Which of the data ranks this is; ranks with the same one see the same samples."""
        return self.global_rank if self.mesh is None else self.mesh.data.get_local_rank()

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold different samples; None for one process, and while ``"auto"`` is undecided."""
        return None if self.mesh is None else self.mesh.data.get_group()

    def _group(self, group: Any) -> dist.ProcessGroup | None:
        if self.mesh is None and self.world_size > 1:  # "auto", of which all ranks are data ranks
            return group if group is not None else dist.group.WORLD
        return ranks.data_group_unless(group, self.data_group)

    @override
    def all_reduce(
        self, tensor: Tensor | Any, group: Any | None = None, reduce_op: dist.ReduceOp | str | None = "mean"
    ) -> Tensor | Any:
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
        """From the ranks with different samples, unless another group than the world is given. One all-gather.

        Returns:
            (data ranks, *shape) in the order of :attr:`data_rank`; in one process the tensor as it is. With
            ``sync_grads``, see :func:`~lightning_dist.gathering.all_gather`.
        """
        group = self._group(group)
        return tensor if group is None else all_gather(tensor, group, sync_grads)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """The same decision on every rank. One all-reduce of one number over the world."""
        return collectives.reduce_decision(decision, all, self.root_device)

    @override
    def barrier(self, name: str | None = None) -> None:
        collectives.barrier(self.root_device)

    @override
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        return collectives.broadcast_object(obj, src)


def _refuse_pipeline(layout: Layout) -> None:
    if layout.pp > 1:
        raise ValueError(
            f"layout {layout} asks for pp={layout.pp} under Fabric: a pipeline has to run the whole training step "
            "itself, microbatch by microbatch, and here the loop is the user's; use HybridStrategy with a Trainer for "
            "pp, or dp_replicate, dp_shard and tp"
        )
