"""Fresh processes for each check; a hang, a death or an exception of theirs becomes one sentence.

[Note: why fresh ranks]
What one check leaves (a broken process group, memory of an accelerator, a lost connection) is not met by the next. They
are forked from a server that has imported torch and Lightning, which takes a tenth of a second instead of ten.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lightning_dist.doctor.failures import RankFailure, failures_told, silence_told
from lightning_dist.doctor.settings import Settings, num_cores
from lightning_dist.elastic.rank import end_with_launching_process, leave_fork_server, leave_process_group

PATIENCE = 10.0
"""Seconds that a rank has to leave."""

IMPORTED = ["lightning_dist", "lightning_dist.doctor.training", "lightning_dist.verify.training"]
LARGE = ("sklearn", "timm", "torchmetrics", "torchvision", "transformers")
"""Packages that ranks find imported too, where this process has them."""


@dataclass(frozen=True)
class _Call:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    environment: dict[str, str]
    place: dict[str, str]
    folder: Path
    is_silent: bool


class Ranks:
    """Processes of one check.

    Args:
        settings: of the examination.
        num_ranks: how many; by default those of the settings.
        together: their environment is that of torchrun, so that they may form one process group. Else each is alone.
        folder: for their output.
    """

    def __init__(self, settings: Settings, num_ranks: int, together: bool, folder: Path) -> None:
        self.settings, self.num_ranks, self.folder = settings, num_ranks, folder
        self._places = _places(num_ranks) if together else [{} for _ in range(num_ranks)]
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def start(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Starts all."""
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*IMPORTED, *(name for name in LARGE if name in sys.modules)])
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else imports may keep forks from using devices
        environment = {"OMP_NUM_THREADS": str(max(1, num_cores() // self.num_ranks)), **os.environ}
        for rank, place in enumerate(self._places):
            is_silent = self.settings.has_fault("silence", rank)
            call = _Call(function, args, environment, place, self.folder, is_silent)
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, call))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def collect(self) -> list[Any]:
        """Waits for what they return, by rank.

        Raises:
            CheckFailed: a rank raised, died, or gave no answer in time.
        """
        limit = time.monotonic() + self.settings.timeout
        waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        answers: dict[int, Any] = {}
        failures: list[RankFailure] = []
        while waiting and (ready := wait(list(waiting), max(0.0, limit - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                failure, answers[rank] = self._answer(rank)
                if failure is not None:
                    failures.append(failure)
                    limit = min(limit, time.monotonic() + self.settings.patience)
        silent = sorted(waiting.values())
        if failures:
            raise failures_told(failures, silent)
        if silent:
            raise silence_told(self._stacks(silent), self.settings.timeout)
        return [answers[rank] for rank in range(self.num_ranks)]

    def _answer(self, rank: int) -> tuple[RankFailure | None, Any]:
        try:
            return pickle.loads(self._pipes[rank].recv_bytes())
        except EOFError:
            self._processes[rank].join(PATIENCE)
            said = (self.folder / f"rank{rank}.log").read_text(errors="replace")[-20000:]
            return RankFailure.of_death(rank, self._processes[rank].exitcode, said), None

    def _stacks(self, ranks: list[int]) -> dict[int, list[str]]:
        """Where ranks stand, the innermost call first."""
        for rank in ranks:
            if self._processes[rank].is_alive() and hasattr(signal, "SIGUSR1"):
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        return {rank: _frames(self.folder / f"rank{rank}.stack") for rank in ranks}

    def kill(self) -> None:
        """Ends all that are alive, at once."""
        for process in self._processes:
            process.kill()

    def end(self) -> None:
        """Lets them leave, together, and kills those that don't."""
        for pipe in self._pipes:
            pipe.close()
        limit = time.monotonic() + PATIENCE
        for process in self._processes:
            process.join(max(0.0, limit - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def run_ranks(
    settings: Settings,
    function: Callable[..., Any],
    *args: Any,
    num_ranks: int | None = None,
    together: bool = True,
) -> list[Any]:
    """What ``function(*args)`` returns in fresh processes, by rank; all have ended then.

    Args:
        settings: of the examination.
        function: at the top of its module.
        args: that can be pickled.
        num_ranks: by default those of the settings.
        together: as ranks of one run, else each for itself.

    Raises:
        CheckFailed: a rank raised, died, or gave no answer in time.
    """
    with tempfile.TemporaryDirectory(prefix="lightning_dist-doctor-") as folder:
        ranks = Ranks(settings, num_ranks or settings.num_ranks, together, Path(folder))
        try:
            ranks.start(function, args)
            return ranks.collect()
        except BaseException:
            ranks.kill()
            raise
        finally:
            ranks.end()


def _places(num_ranks: int) -> list[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {
        "TORCHELASTIC_RUN_ID": "doctor",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
    }
    return [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def _serve(pipe: Connection, rank: int, call: _Call) -> None:
    end_with_launching_process()
    leave_fork_server(call.environment)
    os.environ.update(call.place)
    with (
        (call.folder / f"rank{rank}.log").open("w") as log,
        (call.folder / f"rank{rank}.stack").open("w") as stack,
    ):
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        if hasattr(faulthandler, "register"):
            faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
        while call.is_silent:
            time.sleep(1)
        pipe.send_bytes(pickle.dumps(_result(rank, call)))
        try:
            pipe.recv_bytes()  # ranks leave together: one of them keeps the store of all
        except EOFError:
            leave_process_group()
        sys.stdout.flush()


def _result(rank: int, call: _Call) -> tuple[RankFailure | None, Any]:
    try:
        return None, call.function(*call.args)
    except BaseException as error:
        return RankFailure.of(rank, error), None


def _frames(file: Path) -> list[str]:
    found = re.findall(r'File "([^"]*)", line (\d+) in (\S+)', file.read_text() if file.exists() else "")
    return [f"{name} ({Path(path).name}:{line})" for path, line, name in found]
