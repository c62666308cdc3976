"""What the ranks of a layout do together, for the strategies of the Trainer and of Fabric alike."""

from __future__ import annotations

import os
import random
import sys
import time
from datetime import timedelta
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.distributed import _distributed_is_initialized, _init_dist_connection
from torch import Tensor

from lightning_dist.layout import Layout

T = TypeVar("T")


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


def join_world(environment: ClusterEnvironment, backend: str, timeout: timedelta, device: torch.device) -> None:
    """Makes the process group of the world, if it is not there, and gives all ranks rank 0's random state.

    Communication: the meeting of the ranks, and :func:`share_random_state`.
    """
    device_id = None if device.type == "cpu" else device
    _init_dist_connection(environment, backend, timeout=timeout, device_id=device_id)
    _let_threads_end_before_forks()
    share_random_state(device)


def share_random_state(device: torch.device) -> None:
    """Every rank goes on with rank 0's generators: what is built or drawn from here on is alike.

    Communication: a broadcast of 5 kB over the world for torch's, of 16 bytes more where there is a GPU, and of
    objects for Python's and numpy's.
    """
    generators: list[Any] = [torch]
    if device.type != "cpu":
        generators.append(torch.get_device_module(device))
    for generator in generators:
        state = generator.get_rng_state().to(device)
        dist.broadcast(state, 0)
        generator.set_rng_state(state.cpu())
    others: list[Any] = [random.getstate(), np.random.get_state()]
    dist.broadcast_object_list(others, 0, device=device)
    random.setstate(others[0])
    np.random.set_state(others[1])


def part_random_streams(data_rank: int) -> None:
    """Data ranks draw apart from here on, in dropout and augmentation; data rank 0 goes on as one process would."""
    state = torch.get_rng_state()
    seed = int(torch.randint(2**31, ()))
    torch.set_rng_state(state)
    if data_rank:
        torch.manual_seed(seed + data_rank)
        np.random.seed((seed + data_rank) % 2**32)
        random.seed(seed + data_rank)


def data_group_unless(group: Any, data_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group that a user named, or the ranks with different samples where that is none, or the world.

    Lightning names the world where its caller names nothing (seen in 2.6.6); it holds every sample once for each rank
    of ``tp`` and ``pp``.
    """
    return data_group if group is None or group is dist.group.WORLD else group


def reduce_over(tensor: Tensor, group: dist.ProcessGroup, reduce_op: dist.ReduceOp | str | None) -> Tensor:
    """The tensor reduced over the ranks of a group; a new tensor.

    Lightning's own mean of an integer tensor truncates (the mean of batch sizes 6 and 7 becomes 6, seen in 2.6.6);
    here it is taken in float64.

    Args:
        tensor: on the device of the group's backend.
        group: the ranks that hold different values.
        reduce_op: ``"mean"``, ``"avg"``, ``"sum"``, ``"min"``, ``"max"``, a ``ReduceOp`` or None (sum).

    Communication: one all-reduce over the group, none for a group of one.
    """
    name = reduce_op.lower() if isinstance(reduce_op, str) else None
    mean = name in ("mean", "avg") or reduce_op == dist.ReduceOp.AVG
    tensor = tensor.double() if mean and not tensor.is_floating_point() else tensor.clone()
    num_ranks = dist.get_world_size(group)
    if num_ranks == 1:
        return tensor
    if mean:  # gloo has no ReduceOp.AVG
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group)
        return tensor / num_ranks
    op: Any = getattr(dist.ReduceOp, name.upper()) if name else reduce_op or dist.ReduceOp.SUM
    dist.all_reduce(tensor, op, group)
    return tensor


def decide_together(decision: bool, all: bool, device: torch.device) -> bool:
    """The same decision on every rank: whether all of them, or any, say so. One all-reduce of a number over the world.

    Args:
        decision: of this rank.
        all: whether all have to.
        device: of this rank.
    """
    if not _distributed_is_initialized():
        return decision
    verdict = torch.tensor(int(decision), device=device)
    dist.all_reduce(verdict, dist.ReduceOp.MIN if all else dist.ReduceOp.MAX)
    return bool(verdict)


def barrier(device: torch.device) -> None:
    """Waits for all ranks of the world."""
    if not _distributed_is_initialized():
        return
    if dist.get_backend() == "nccl":
        dist.barrier(device_ids=[device.index])
    else:
        dist.barrier()


def broadcast(obj: T, src: int = 0) -> T:
    """The object of one rank on all ranks. One broadcast of the pickled object over the world."""
    if not _distributed_is_initialized():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src)
    return box[0]


@cache
def _let_threads_end_before_forks() -> None:
    """Keeps a fork, of a loader's workers say, away from the end of a collective.

    A thread of the backend lets go of what it was given then, for which it asks for Python; a process that is forked in
    that moment waits for good in CPython before 3.11.10 (python/cpython#112275; seen once in 300 forks).
    """
    if sys.version_info < (3, 11, 10) and hasattr(os, "register_at_fork"):
        os.register_at_fork(before=partial(time.sleep, 2e-3))
