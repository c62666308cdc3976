"""What the ranks of a layout do together, for the strategies of the Trainer and of Fabric alike."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.distributed import _init_dist_connection

from lightning_dist.layout import Layout
from lightning_dist.random_states import share_random_state


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


def data_group_unless(group: Any, data_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group that a user named, or the ranks with different samples where that is none, or the world.

    Lightning names the world where its caller names nothing (seen in 2.6.6); it holds every sample once for each rank
    of ``tp`` and ``pp``.
    """
    return data_group if group is None or group is dist.group.WORLD else group


@cache
def _let_threads_end_before_forks() -> None:
    """Keeps a fork, of a loader's workers say, away from the end of a collective.

    A thread of the backend lets go of what it was given then, for which it asks for Python; a process that is forked in
    that moment waits for good in CPython before 3.11.10 (python/cpython#112275; seen once in 300 forks).
    """
    if sys.version_info < (3, 11, 10) and hasattr(os, "register_at_fork"):
        os.register_at_fork(before=partial(time.sleep, 2e-3))
