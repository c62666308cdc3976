"""The processes of one version: started together, they train in turns with those of another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from recipes.benchmark.agreement import Trained
from recipes.benchmark.start import LAUNCH_VARIABLES, ROOT
from recipes.benchmark.version_rank import CHECKED, Task


class VersionProcesses:
    """The ranks of a version, which end with the context.

    Args:
        name: of the version, for messages.
        package: folder that holds its ``lightning_dist``.
        ranks: processes.
        device: its type.

    Raises:
        RuntimeError: in a method: a rank ended; the end of what it printed is in the message.
    """

    def __init__(self, name: str, package: Path, ranks: int, device: str) -> None:
        self.name, self.package, self.device = name, package, device
        self._scratch = tempfile.TemporaryDirectory(prefix="lightning_dist-benchmark-")
        self._folder = Path(self._scratch.name)
        # first on the path of the ranks, so that lightning_dist is the version's and the recipes are these
        (self._folder / "lightning_dist").symlink_to(package / "lightning_dist", target_is_directory=True)
        self._ranks = [self._start(rank, ranks) for rank in range(ranks)]

    def _start(self, rank: int, ranks: int) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
        environment.setdefault("OMP_NUM_THREADS", "1")
        environment |= {
            "PYTHONPATH": os.pathsep.join([str(self._folder), str(ROOT)]),
            "TORCHELASTIC_RUN_ID": "benchmark",  # a Trainer joins these ranks and starts none
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "1",  # nobody connects to it: the process group is there when the Trainer comes
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
        }
        with self._log(rank).open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "recipes.benchmark.version_rank", str(self.package), self.device],
                cwd=self._folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def ask_for(self, task: Task) -> None:
        """What is trained next."""
        self._send(task.to_line())

    def ask_for_check(self) -> None:
        """Lets the ranks train some steps in float64; see :meth:`checked`."""
        self._send("check")

    def checked(self) -> list[Trained]:
        """By rank: its losses, and the weights after the last step."""
        answers = self._answers()
        weights = torch.load(self._folder / CHECKED, map_location="cpu", weights_only=True)["state_dict"]
        return [Trained(answer["losses"], weights) for answer in answers]

    def begin(self) -> None:
        """The run that is timed."""
        self._send("train")

    def take(self, steps: int) -> dict[str, list[float]]:
        """Runs so many steps: ``wall``, the seconds of each on the slowest rank; ``user``, the mean of a step over all
        of them of the seconds that all ranks computed together."""
        self._send(f"take {steps}")
        answers = self._answers()
        wall = [max(seconds) for seconds in zip(*(answer["wall"] for answer in answers), strict=True)]
        return {"wall": wall, "user": [sum(answer["user"] for answer in answers) / steps]}

    def end(self) -> None:
        """Lets the ranks end their run; they wait for the next task."""
        self._send("end")

    def __enter__(self) -> VersionProcesses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Kills what still runs."""
        for process in self._ranks:
            process.kill()
        for process in self._ranks:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
        self._scratch.cleanup()

    def _send(self, command: str) -> None:
        for rank, process in enumerate(self._ranks):
            assert process.stdin is not None
            try:
                process.stdin.write(f"{command}\n")
                process.stdin.flush()
            except BrokenPipeError:
                raise self._failure(rank) from None

    def _answers(self) -> list[dict[str, Any]]:
        answers = []
        for rank, process in enumerate(self._ranks):
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise self._failure(rank)
            answers.append(json.loads(line))
        return answers

    def _failure(self, rank: int) -> RuntimeError:
        status = self._ranks[rank].wait()
        printed = self._log(rank).read_text()[-3000:]
        return RuntimeError(f"rank {rank} of {self.name} ({self.package}) ended with {status}:\n{printed}")

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank_{rank}.log"
