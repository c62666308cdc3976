"""One rank is killed in the middle of a training: the others end, and the last checkpoint goes on to equal numbers."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_dist.doctor.checkpoints import NETWORK
from lightning_dist.doctor.layouts import over_any
from lightning_dist.doctor.parity import BOUND, References, assert_resumed
from lightning_dist.doctor.ranks import run_ranks
from lightning_dist.doctor.results import CheckFailed, CheckSkipped, Finding
from lightning_dist.doctor.settings import Settings
from lightning_dist.doctor.training import Job, Saving, train
from lightning_dist.elastic import WorkerFailed, launch

KILLED_IN = 4
"""The step in whose middle the rank ends; those before are saved, the last of them within an epoch."""

PROMPT = 10.0
"""Seconds in which the others have to end; the agent kills them at once."""


class Killed(Callback):
    """Ends this rank by SIGKILL after the backward of a step, while others wait for its part of the gradient norm.

    Args:
        note: a file for the time of its death.
    """

    def __init__(self, note: Path) -> None:
        self._note = note

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """In the middle of the step."""
        if trainer.global_step == KILLED_IN - 1:
            self._note.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


def check_kill(settings: Settings, references: References) -> Finding:
    """Kills the last rank of a training that :func:`~lightning_dist.elastic.launch` started."""
    if settings.num_ranks < 2:
        raise CheckSkipped("one rank has no others that should end; pass --accelerator cpu, or more --devices")
    layout = over_any([["dp_shard", "tp"], ["dp_shard"]], settings.num_ranks)
    victim = settings.num_ranks - 1
    with tempfile.TemporaryDirectory(prefix="kill-", dir=settings.directory) as name:
        folder = Path(name)
        saving = Saving(folder, "sharded", every=1)
        job = Job(NETWORK, settings, layout, settings.device_type, saving=saving)
        seconds = run_ranks(settings, lose_a_rank, job, victim, folder / "killed", num_ranks=1, together=False)[0]
        last = saving.path(KILLED_IN - 1)
        if not last.exists():
            raise CheckFailed(
                f"rank {victim} was killed in step {KILLED_IN}, and there is no checkpoint of the step before"
            )
        on = Job(NETWORK, settings, layout, settings.device_type, resume=last)
        worst = assert_resumed(
            f"gone on after rank {victim} was killed", run_ranks(settings, train, on), references.of(NETWORK)
        )
    return Finding(
        f"rank {victim} of {layout} was killed, the others ended after {seconds:.1f} s, and the last checkpoint goes "
        f"on; relative difference {worst:.1e}, bound {BOUND:g}",
        {"seconds until the others ended": seconds},
    )


def lose_a_rank(job: Job, victim: int, note: Path) -> float:
    """Launches a training of which a rank is killed.

    Returns:
        seconds from its death until all other ranks have ended.
    """
    try:
        launch(train_or_die, job, victim, note, num_processes=job.settings.num_ranks, start_method="fork")
    except WorkerFailed as failure:
        seconds = time.time() - float(note.read_text()) if note.exists() else 0.0
        if failure.rank != victim or not note.exists():
            raise CheckFailed(f"before rank {victim} was killed, {str(failure).partition(chr(10))[0]}") from failure
        if seconds > PROMPT:
            raise CheckFailed(
                f"after rank {victim} was killed the others went on for {seconds:.0f} s; {PROMPT:g} s are enough"
            ) from None
        return seconds
    raise CheckFailed(f"rank {victim} was killed in step {KILLED_IN}, and the launcher told no failure")


def train_or_die(job: Job, victim: int, note: Path) -> None:
    """On a rank: trains; the victim does not come to its end."""
    callbacks: list[Callback] = [Killed(note)] if int(os.environ["RANK"]) == victim else []
    train(job, *callbacks)
