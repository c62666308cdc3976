"""A pool of ranks for the whole test run, forked from one process that has imported what they need.

Importing torch and Lightning takes a rank ten seconds; forking it takes none.
"""

from __future__ import annotations

import atexit
import gc
import os
import pickle
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import _collective_utils, _redistribute, debug

from tests.support import device

MAX_RANKS = 4
IMPORTED = [
    "tests.support.parity",
    "recipes.language_model.module",
    "recipes.image_classification.module",
    "timm",
    "transformers",
]
"""What the ranks find imported."""


class RankError(AssertionError):
    """A rank raised; the message is its traceback.

    Args:
        answers: by rank, of those that gave one.
    """

    def __init__(self, message: str, answers: dict[int, Any]) -> None:
        super().__init__(message)
        self.answers = answers


class RankFault(RankError):
    """A fault of memory ended a rank."""


class RankPool:
    """Processes that wait for work. ``run(2, f, x)`` calls ``f(x)`` on two ranks of a fresh process group.

    The environment of each call is that of ``torchrun``, so a ``Trainer`` made inside joins instead of launching.
    """

    def __init__(self, size: int = MAX_RANKS) -> None:
        self.size = size
        self._pipes: list[Connection] = []
        self._processes: list[mp.process.BaseProcess] = []

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        atexit.register(self.close)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            # not daemons: data loaders in the ranks start workers of their own
            process = context.Process(target=_serve, args=(theirs, rank), daemon=False)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(
        self,
        num_ranks: int,
        function: Callable[..., Any],
        *args: Any,
        timeout: float = 180,
        patience: float | None = None,
    ) -> list[Any]:
        """Results of ``function(*args)``, by rank.

        Args:
            num_ranks: that run it.
            function: at the top of its module.
            args: of the function.
            timeout: seconds for an answer.
            patience: seconds that a rank may answer after another one did; by default, as the timeout.

        A rank that memory faults end (in a thread of gloo, seen once in some thousand jobs, torch 2.14.1) is told in a
        warning, and the job runs once more.

        Raises:
            RankError: with the traceback of the rank that raised first, or the ranks that did not answer in time.
        """
        device.skip_without(num_ranks)
        patience = timeout if patience is None else patience
        try:
            return self._run(num_ranks, (function, args), timeout, patience)
        except RankFault as fault:
            warnings.warn(f"{fault}; the job runs once more", stacklevel=2)
            return self._run(num_ranks, (function, args), timeout, patience)

    def _run(self, num_ranks: int, call: tuple[Any, Any], timeout: float, patience: float) -> list[Any]:
        if not self._processes:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            job = pickle.dumps((*call, num_ranks, str(Path(folder) / "store")))
            for pipe in self._pipes[:num_ranks]:
                pipe.send_bytes(job)
            return self._collect(num_ranks, timeout, patience)

    def _collect(self, num_ranks: int, timeout: float, patience: float) -> list[Any]:
        results: dict[int, Any] = {}
        errors, faults = list[str](), False
        waiting = {self._pipes[rank]: rank for rank in range(num_ranks)}
        while waiting:
            ready = wait(list(waiting), timeout)
            if not ready:
                silent = sorted(waiting.values())
                self.close()
                raise RankError(f"ranks {silent} gave no answer in {timeout} s\n" + "\n".join(errors), results)
            timeout = min(timeout, patience)
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    error, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self._processes[rank].join(10)
                    status = self._processes[rank].exitcode
                    error, value = f"rank {rank} died with status {status}", None
                    faults |= status in (-signal.SIGSEGV, -signal.SIGBUS)
                results[rank] = value
                if error:
                    errors.append(f"rank {rank}:\n{error}")
                    timeout = min(timeout, 60)
        if errors:
            if any("died" in error for error in errors):
                self.close()
            raise (RankFault if faults else RankError)("\n".join(errors), results)
        return [results[rank] for rank in range(num_ranks)]

    def close(self) -> None:
        """Ends the processes; the next ``run`` starts new ones."""
        for process in self._processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _serve(pipe: Connection, rank: int) -> None:
    gc.freeze()  # what was imported, which each job's collection would go through
    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # of loaders' workers: a spawned rank would spawn them, with all imports
    while True:
        try:
            function, args, num_ranks, store = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        error, value = None, None
        environment = _environment(rank, num_ranks)
        os.environ.update(environment)
        try:
            torch.manual_seed(0)
            own = device.take(rank)
            dist.init_process_group(
                device.backend(own),
                store=dist.FileStore(store, num_ranks),
                rank=rank,
                world_size=num_ranks,
                timeout=timedelta(seconds=45),
                device_id=None if own.type == "cpu" else own,
            )
            dist.barrier()  # a rank that ends its job at once would leave before the others have connected
            value = function(*args)
        except BaseException:
            error = traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            for name in (*environment, "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
                os.environ.pop(name, None)
            _forget_meshes()
            gc.collect()
        try:
            answer = pickle.dumps((error, value))
        except Exception:
            answer = pickle.dumps((f"the result can't be pickled\n{traceback.format_exc()}", None))
        pipe.send_bytes(answer)


def _forget_meshes() -> None:
    """Clears DTensor's caches: their keys hold device meshes, which hold process groups and the groups' threads."""
    debug._clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()
    _redistribute.clear_redistribute_planner_cache()
    _collective_utils.MeshTopoInfo.build_from_mesh.cache_clear()


def _environment(rank: int, num_ranks: int) -> dict[str, str]:
    return {
        "TORCHELASTIC_RUN_ID": "tests",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",  # the process group is there already; nothing connects to it
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
    }


POOL = RankPool()


def run_on_ranks(
    num_ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 180, patience: float | None = None
) -> list[Any]:
    """Results of ``function(*args)`` on ``num_ranks`` ranks, by rank; see :meth:`RankPool.run`."""
    return POOL.run(num_ranks, function, *args, timeout=timeout, patience=patience)
