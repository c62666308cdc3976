"""The ranks of a layout, for the strategies of the Trainer and of Fabric alike, and the layout ``"auto"``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout

from lightning_dist.collectives import reduce_tensor
from lightning_dist.compat.lightning import default_backend, form_world
from lightning_dist.elastic.adapt import adapted_layout
from lightning_dist.elastic.attempt import Attempt
from lightning_dist.layout import MESH_AXES, Layout, ParallelMesh
from lightning_dist.random_states import part_random_streams, share_random_state

STATES_PER_WEIGHT = 3
"""Numbers kept beside each trainable one: its gradient and AdamW's two moments."""
ROOM = 0.6
"""Share of the memory that parameters, gradients and optimizer states may take; the rest is for activations."""


class LayoutRanks:
    """The processes of a run: where this one lies along the axes of the layout, and how they talk.

    Args:
        requested: the user's layout; None for ``"auto"``, which is chosen when the module is known.
        backend: of torch.distributed; None for that of the device.
        timeout: of collectives.
        on_host: whether ranks also send what lies in the memory of the host.
        fallbacks: layouts for a run that goes on with another number of ranks, see :func:`adapted_layout`; None for who
            does not go on so.
    """

    def __init__(
        self,
        requested: Layout | None,
        backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
        on_host: bool = False,
        fallbacks: Sequence[Layout] | None = None,
    ) -> None:
        self.requested, self.timeout, self._fallbacks = requested, timeout, fallbacks
        self.layout: Layout | None = None
        """Resolved; None while ``"auto"`` is undecided."""
        self.mesh: ParallelMesh | None = None
        """The ranks along the axes of the layout; None for one process."""
        self.device, self.rank, self.world_size = torch.device("cpu"), 0, 1
        self.num_processes = self.num_nodes = 1
        """Processes of this node, as Lightning's launchers ask, and machines."""
        self.first_data_ranks: int | None = None
        """Of a run that began with another number of ranks, which its batch size is for; else None."""
        self._backend, self._on_host = backend, on_host
        self._hosts: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the groups, which belong to the processes of a run."""
        return {**vars(self), "mesh": None, "_hosts": None}

    def place(self, environment: ClusterEnvironment, devices: list[torch.device], num_nodes: int) -> None:
        """Says which rank this is, once devices and nodes are known; a layout that does not fit is a ValueError.

        Where nodes come and go, how many there are is known to who started the ranks, and not to the user's script.
        """
        first = None if (attempt := Attempt.current()) is None else attempt.first_ranks
        self.num_processes = len(devices)
        self.num_nodes = num_nodes if first is None else max(1, environment.world_size() // len(devices))
        self.world_size = self.num_processes * self.num_nodes
        self.device = devices[environment.local_rank()]
        environment.set_world_size(self.world_size)
        environment.set_global_rank(environment.node_rank() * self.num_processes + environment.local_rank())
        self.rank = environment.global_rank()
        rank_zero_only.rank = self.rank  # type: ignore[attr-defined]
        changed = first if self._fallbacks is not None and first != self.world_size else None
        if self.requested is not None:
            self.layout = self._resolve(self.requested, changed)
        if changed is not None:
            at_first = None if self.requested is None else resolve(self.requested, changed)
            self.first_data_ranks = changed if at_first is None else at_first.num_data_ranks

    def _resolve(self, requested: Layout, first: int | None) -> Layout:
        """``first`` ranks were there when the run began, if there are others now."""
        if first is None:
            return resolve(requested, self.world_size)
        return resolve(adapted_layout(requested, first, self.world_size, self._fallbacks or ()), self.world_size)

    def join(self, environment: ClusterEnvironment) -> None:
        """Makes the process group of the world, if it is not there; see :func:`share_random_state`."""
        if self.world_size > 1:
            form_world(environment, self.backend, self.timeout, self.device)
            _let_threads_end_before_forks()
            share_random_state(self.device)

    @property
    def backend(self) -> str:
        """Of torch.distributed, by device where there are two."""
        backend = self._backend or default_backend(self.device)
        if not self._on_host or self.device.type == "cpu" or ":" in backend:
            return backend
        return f"cpu:gloo,{self.device.type}:{backend}"

    def form_mesh(self) -> None:
        """Makes the process groups along the axes, once; nothing for one process or an undecided layout."""
        if self.layout is not None and self.world_size > 1 and self.mesh is None:
            self.mesh = self.layout.build_mesh(self.device.type)
            for group in {*self.groups.values()} - {dist.group.WORLD}:  # a mesh gives its groups the backend's own
                dist.set_timeout(self.timeout, group)

    def decide(self, module: nn.Module) -> tuple[Layout, str]:
        """The layout, and why it was chosen: by :func:`choose_layout`, if it is ``"auto"`` and was undecided."""
        if self.layout is not None:
            return self.layout, ""
        self.layout, reason = choose_layout(module, self.world_size, self.device, self.num_processes)
        self.form_mesh()
        return self.layout, reason

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
    def hosts(self) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """The world, and the ``logs_group``, for what hosts tell each other in tensors on the CPU.

        They read it while the devices compute. The same groups where those take such tensors (gloo); else of gloo's
        own, which all ranks of a formed mesh make together when one first asks.
        """
        if self._hosts is None:
            assert self.mesh is not None
            assert dist.group.WORLD is not None
            if self.device.type == "cpu":
                self._hosts = dist.group.WORLD, self.mesh.logs.get_group()
            else:
                self._hosts = groups_of_hosts(self.mesh, self.timeout)
        return self._hosts

    @property
    def groups(self) -> dict[str, dist.ProcessGroup]:
        """All process groups of the layout, by a name that is the same on the ranks of each."""
        if dist.group.WORLD is None:
            return {}
        if self.mesh is None:
            return {"world": dist.group.WORLD}
        groups = {axis: self.mesh.root[axis].get_group() for axis in MESH_AXES}
        groups |= {"data": self.mesh.data.get_group(), "logs": self.mesh.logs.get_group()}
        named = {f"{name} {dist.get_process_group_ranks(group)}": group for name, group in groups.items()}
        return {"world": dist.group.WORLD, **named}

    def group_unless(self, group: Any) -> dist.ProcessGroup | None:
        """The group that a user named, or the ranks with different samples where that is none, or the world.

        Lightning names the world where its caller names nothing (seen in 2.6.6); it holds every sample once for each
        rank of ``tp`` and ``pp``.
        """
        return self.data_group if group is None or group is dist.group.WORLD else group

    def reduce(self, tensor: Any, group: Any = None, op: dist.ReduceOp | str | None = "mean") -> Any:
        """Over the ranks with different samples, unless another group than the world is given. One all-reduce."""
        group = self.group_unless(group)
        return reduce_tensor(tensor, group, op) if isinstance(tensor, Tensor) and group is not None else tensor

    def part_random_streams(self) -> None:
        """Data ranks draw apart from here on."""
        part_random_streams(self.data_rank)


def groups_of_hosts(mesh: ParallelMesh, timeout: timedelta) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Groups of gloo of the same ranks as the world, and as those that log different values; every rank calls it."""
    world: Any = dist.new_group(backend="gloo", timeout=timeout)
    if mesh.logs.size() == dist.get_world_size():
        return world, world
    apart = mesh.root.mesh.flatten(0, 2).flatten(1).T.tolist()
    logs, _ = dist.new_subgroups_by_enumeration(apart, timeout=timeout, backend="gloo")
    assert isinstance(logs, dist.ProcessGroup)
    return world, logs


_SHOWN = ("layout", "mesh", "num_data_ranks", "num_processes", "data_rank", "data_group")
shown_of_ranks: Any = [property(attrgetter(f"ranks.{name}"), doc="See :class:`LayoutRanks`.") for name in _SHOWN]
"""Properties of a strategy that show what its ``ranks`` have."""


def resolve(requested: Layout, num_ranks: int) -> Layout:
    """The layout on so many ranks; raises as :meth:`Layout.resolve`, and for an axis that is to come."""
    layout = requested.resolve(num_ranks)
    ready = ("pp", "dp_replicate", "dp_shard", "tp")
    asked = [f"{axis}={degree}" for axis, degree in layout.items() if degree > 1 and axis not in ready]
    if asked:
        raise ValueError(
            f"layout {layout} asks for {', '.join(asked)}; this version trains over {', '.join(ready)} only"
        )
    return layout


def choose_layout(module: nn.Module, world_size: int, device: torch.device, ranks_per_node: int) -> tuple[Layout, str]:
    """The layout with the fewest shards under which the module's states fit, and why.

    The module is whole, on any device or on meta; on the CPU, the ranks of a node share its memory.

    Communication: one all-reduce of one number over the world (the least memory of any rank counts).
    """
    memory = _memory(device, ranks_per_node)
    if dist.is_initialized():
        least = torch.tensor(memory, dtype=torch.int64, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        memory = int(least)
    needed = state_bytes(module)
    fitting = [s for s in range(1, world_size + 1) if world_size % s == 0 and needed / s <= ROOM * memory]
    shards = fitting[0] if fitting else world_size
    layout = Layout(dp_replicate=world_size // shards, dp_shard=shards)
    fits = f"; over {shards} shards that fits" if shards > 1 else ", which fits"
    if not fitting:
        fits = f"; even over {shards} shards that is more than"
    room = f"{ROOM:.0%} of the {memory / 2**30:.3g} GiB of a rank"
    return layout, f"parameters, gradients and AdamW's states take {needed / 2**30:.3g} GiB{fits} {room}"


def state_bytes(module: nn.Module) -> int:
    """Bytes of parameters, gradients and AdamW's states of the whole module in training."""
    return sum(p.nbytes * (1 + STATES_PER_WEIGHT * p.requires_grad) for p in module.parameters())


def _memory(device: torch.device, ranks_per_node: int) -> int:
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // ranks_per_node
    return torch.get_device_module(device).mem_get_info(device)[0]


@cache
def _let_threads_end_before_forks() -> None:
    """Keeps a fork, of a loader's workers say, away from the end of a collective.

    A thread of the backend lets go of what it was given then, for which it asks for Python; a process that is forked in
    that moment waits for good in CPython before 3.11.10 (python/cpython#112275; seen once in 300 forks).
    """
    if sys.version_info < (3, 11, 10) and hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lambda: time.sleep(2e-3) if dist.is_initialized() else None)
