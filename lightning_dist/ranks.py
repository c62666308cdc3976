"""The ranks of a layout, for the strategies of the Trainer and of Fabric alike."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from lightning_dist.collectives import reduce_tensor
from lightning_dist.compat.lightning import default_backend, form_world
from lightning_dist.layout import Layout, ParallelMesh
from lightning_dist.random_states import part_random_streams, share_random_state

T = TypeVar("T")


class LayoutRanks:
    """The processes of a run: where this one lies along the axes of the layout, and how they talk.

    Args:
        requested: the user's layout; None for ``"auto"``, which is chosen when the module is known.
        backend: of torch.distributed; None for that of the device.
        timeout: of collectives.
    """

    def __init__(
        self, requested: Layout | None, backend: str | None = None, timeout: timedelta = default_pg_timeout
    ) -> None:
        self.requested, self.timeout = requested, timeout
        self.layout: Layout | None = None
        """Resolved; None while ``"auto"`` is undecided."""
        self.mesh: ParallelMesh | None = None
        """None for one process."""
        self.device = torch.device("cpu")
        """The device of this rank."""
        self.rank, self.world_size = 0, 1
        self.num_processes = self.num_nodes = 1
        """Processes of this node, and machines."""
        self._backend = backend

    def __getstate__(self) -> dict[str, Any]:
        """Without the mesh, which belongs to the processes of a run."""
        return {**vars(self), "mesh": None}

    # ------------------------------------------------------------------ forming

    def place(self, environment: ClusterEnvironment, devices: list[torch.device], num_nodes: int) -> None:
        """Says which rank this is, as soon as devices and nodes are known; the layout is checked here.

        Args:
            environment: is told the rank and the size of the world.
            devices: of this node's processes.
            num_nodes: machines of the run.

        Raises:
            ValueError: the layout does not fit the number of ranks.
        """
        self.num_processes, self.num_nodes = len(devices), num_nodes
        self.world_size = self.num_processes * num_nodes
        self.device = devices[environment.local_rank()]
        environment.set_world_size(self.world_size)
        environment.set_global_rank(environment.node_rank() * self.num_processes + environment.local_rank())
        self.rank = environment.global_rank()
        rank_zero_only.rank = self.rank  # type: ignore[attr-defined]
        if self.requested is not None:
            self.layout = resolve(self.requested, self.world_size)

    @property
    def backend(self) -> str:
        """Backend of torch.distributed."""
        return self._backend or default_backend(self.device)

    def join(self, environment: ClusterEnvironment) -> None:
        """Makes the process group of the world, if it is not there, and gives all ranks rank 0's random state.

        Communication: the meeting of the ranks, and :func:`share_random_state`; none for one process.
        """
        if self.world_size > 1:
            form_world(environment, self.backend, self.timeout, self.device)
            _let_threads_end_before_forks()
            share_random_state(self.device)

    def form_mesh(self) -> None:
        """Makes the process groups along the axes, once; nothing for one process or an undecided layout."""
        if self.layout is not None and self.world_size > 1 and self.mesh is None:
            self.mesh = self.layout.build_mesh(self.device.type)

    # ------------------------------------------------------------------ places

    def has_pipeline(self, num_ranks: int) -> bool:
        """Whether the requested layout has a pipeline on so many ranks."""
        return self.requested is not None and resolve(self.requested, num_ranks).pp > 1

    @property
    def num_data_ranks(self) -> int:
        """Number of ranks, or groups of ranks, that see different samples."""
        return self.world_size if self.layout is None else self.layout.num_data_ranks

    @property
    def data_rank(self) -> int:
        """Which of the data ranks this is; ranks with the same one see the same samples."""
        return self.rank if self.mesh is None else self.mesh.data.get_local_rank()

    @property
    def holds_shards(self) -> bool:
        """Whether a rank holds less than the whole of some parameters."""
        return self.world_size > 1 and self.layout is not None and self.layout.holds_shards

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold different samples; None for one process."""
        return None if self.mesh is None else self.mesh.data.get_group()

    @property
    def logs_group(self) -> dist.ProcessGroup | None:
        """The ranks that log different values: of other samples or other stages; None for one process."""
        return None if self.mesh is None else self.mesh.logs.get_group()

    @property
    def groups(self) -> dict[str, dist.ProcessGroup]:
        """All process groups of the layout, by a name that is the same on the ranks of each."""
        if dist.group.WORLD is None:
            return {}
        groups: dict[str, dist.ProcessGroup] = {"world": dist.group.WORLD}
        if self.mesh is not None:
            meshes = {axis: self.mesh.root[axis] for axis in self.mesh.root.mesh_dim_names or ()}
            for name, mesh in {**meshes, "data": self.mesh.data, "logs": self.mesh.logs}.items():
                group = mesh.get_group()
                groups[f"{name} {dist.get_process_group_ranks(group)}"] = group
        return groups

    # ------------------------------------------------------------------ talking

    def group_unless(self, group: Any) -> dist.ProcessGroup | None:
        """The group that a user named, or the ranks with different samples where that is none, or the world.

        Lightning names the world where its caller names nothing (seen in 2.6.6); it holds every sample once for each
        rank of ``tp`` and ``pp``.
        """
        return self.data_group if group is None or group is dist.group.WORLD else group

    def reduce(self, tensor: Any, group: Any = None, op: dist.ReduceOp | str | None = "mean") -> Any:
        """Over the ranks with different samples, unless another group than the world is given. One all-reduce."""
        group = self.group_unless(group)
        if not isinstance(tensor, Tensor) or group is None:
            return tensor
        return reduce_tensor(tensor, group, op)

    def part_random_streams(self) -> None:
        """Data ranks draw apart from here on."""
        part_random_streams(self.data_rank)


def resolve(requested: Layout, num_ranks: int) -> Layout:
    """The layout on so many ranks.

    Raises:
        ValueError: it does not fit, see :meth:`~lightning_dist.Layout.resolve`, or has an axis that is to come.
    """
    layout = requested.resolve(num_ranks)
    ready = ("pp", "dp_replicate", "dp_shard", "tp")
    asked = [f"{axis}={degree}" for axis, degree in layout.items() if degree > 1 and axis not in ready]
    if asked:
        raise ValueError(
            f"layout {layout} asks for {', '.join(asked)}; this version trains over {', '.join(ready)} only"
        )
    return layout


@cache
def _let_threads_end_before_forks() -> None:
    """Keeps a fork, of a loader's workers say, away from the end of a collective.

    A thread of the backend lets go of what it was given then, for which it asks for Python; a process that is forked in
    that moment waits for good in CPython before 3.11.10 (python/cpython#112275; seen once in 300 forks).
    """
    if sys.version_info < (3, 11, 10) and hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lambda: time.sleep(2e-3) if dist.is_initialized() else None)
