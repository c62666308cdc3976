"""Ray: starts the ranks of a job as workers of Ray Train.

[Note: a process group of Ray's]
Ray Train joins the workers in a process group of one backend before they do anything, and Lightning would take it as it
is. A strategy makes its own (for tensors on the host as well, with its own time limit), so a worker leaves Ray's group
first, and the group tells where the next one meets.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightning_dist.elastic import WorkerFailed


@dataclass(frozen=True)
class Ray:
    """What a job asks Ray for.

    Attributes:
        num_ranks: of the whole job.
        resources_per_rank: what each takes of its machine: ``{"GPU": 1, "CPU": 8}``.
        address: of the cluster; None for that of ``RAY_ADDRESS``, else for one that is started on this machine.
        placement: Ray's strategy of placing ranks: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD.
        max_restarts: how often all ranks are started again after one of them, or its machine, failed.
        storage: a directory for what Ray Train notes; all machines see it.
        name: of the run in ``storage``.
    """

    num_ranks: int
    resources_per_rank: Mapping[str, float]
    storage: str | Path
    address: str | None = None
    placement: str = "PACK"
    max_restarts: int = 0
    name: str = "lightning_dist"

    def launch(self, worker: Callable[..., Any], *args: Any) -> Any:
        """Calls ``worker(*args)`` on every rank, and waits for them.

        The ranks find themselves in the environment as torchrun's do (``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``,
        ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``), and are in no process group. After a restart
        ``worker`` is called again.

        Communication: one gather of Python objects over all ranks, before ``worker``.

        Args:
            worker: a function that can be imported by its module and name, on all machines.
            args: its arguments; they and the result are pickled.

        Returns:
            what ``worker`` returned on rank 0.

        Raises:
            ValueError: Ray is missing, the cluster can't be reached or lacks what the ranks ask for, or machines get
                different numbers of ranks.
            WorkerFailed: a rank raised, or was lost, ``max_restarts`` times after the first.
        """
        ray = _import_ray()
        _connect(ray, self.address)
        self._check_resources(ray.cluster_resources())
        trainer = ray.train.torch.TorchTrainer(
            _on_rank,
            train_loop_config={"call": (worker, args)},
            scaling_config=ray.train.ScalingConfig(
                num_workers=self.num_ranks,
                use_gpu=self.resources_per_rank.get("GPU", 0) > 0,
                resources_per_worker=dict(self.resources_per_rank),
                placement_strategy=self.placement,
            ),
            run_config=ray.train.RunConfig(
                name=self.name,
                storage_path=str(Path(self.storage).absolute()),
                failure_config=ray.train.FailureConfig(max_failures=self.max_restarts),
            ),
        )
        with _as_the_caller_left_it():
            try:
                return trainer.fit().return_value
            except ray.train.WorkerGroupError as error:
                raise _first(error.worker_failures) from None

    def _check_resources(self, available: Mapping[str, float]) -> None:
        """Ray would wait for machines that may never come."""
        for name, amount in self.resources_per_rank.items():
            if amount * self.num_ranks > available.get(name, 0):
                raise ValueError(
                    f"{self.num_ranks} ranks need {amount * self.num_ranks:g} {name}, and Ray's cluster has "
                    f"{available.get(name, 0):g}; ask for less, or add machines to it"
                )


def _first(failures: Mapping[int, Exception]) -> WorkerFailed:
    """That of the rank that failed first: the others usually only lost their connection to it, a RuntimeError."""
    last = {rank: _last_line(error) for rank, error in failures.items()}
    rank = min(last, key=lambda rank: (last[rank].startswith(("RuntimeError", "torch.distributed.")), rank))
    whole = str(failures[rank])
    return WorkerFailed(rank, f"failed: {last[rank]}", whole, whole)


def _last_line(error: Exception) -> str:
    """Kind and message of what a rank raised; Ray tells the traceback as text, or only the message."""
    text = str(error).rstrip()
    return text.rpartition("\n")[2] if "\n" in text else f"{type(error).__name__}: {text}"


def _import_ray() -> Any:
    try:
        import ray
        import ray.train.torch
    except ImportError:
        raise ValueError("Ray is not installed; pip install 'lightning_dist[ray]'") from None
    return ray


def _connect(ray: Any, address: str | None) -> None:
    if ray.is_initialized():
        return
    try:
        ray.init(address)
    except ConnectionError as error:
        raise ValueError(f"Ray's cluster {address} can't be reached: {error}") from None


@contextlib.contextmanager
def _as_the_caller_left_it() -> Iterator[None]:
    """Ray Train takes SIGINT, and would have ranks work in a directory of its own."""
    on_interrupt, name = signal.getsignal(signal.SIGINT), "RAY_CHDIR_TO_TRIAL_DIR"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _on_rank(config: dict[str, Any]) -> Any:
    worker, args = config["call"]
    if dist.is_initialized():
        _leave_rays_group()
    return worker(*args)


def _leave_rays_group() -> None:
    """See [Note: a process group of Ray's]."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        mine = int(os.environ["LOCAL_WORLD_SIZE"]), listener.getsockname()[1]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        dist.destroy_process_group()
    if len({num_local for num_local, _ in everyone}) > 1:
        counts = ", ".join(str(num_local) for num_local, _ in everyone)
        raise ValueError(
            f"Ray gave machines different numbers of ranks (by rank: {counts} on its machine); ask for so much per "
            "rank that each machine has room for the same number, or place them by STRICT_PACK or STRICT_SPREAD"
        )
    # where rank 0 found a port free: that of Ray's group may still be open when the first rank comes back to it
    os.environ["MASTER_PORT"] = str(everyone[0][1])
