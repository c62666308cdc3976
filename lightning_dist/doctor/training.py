"""A short training on this rank, and what it leaves: loss and gradient norm of every step, and the final weights."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy, Layout
from lightning_dist.compat.distributed import local_tensor
from lightning_dist.compat.torch import DisableTorchFunctionSubclass
from lightning_dist.doctor.networks import NETWORKS, build
from lightning_dist.doctor.settings import Settings
from lightning_dist.placeholder import is_placeholder

STEPS, STEPS_OF_EPOCH = 4, 2
"""A checkpoint after 2 steps goes on with the next epoch, as plain Lightning can; one after 3 within it."""

SMALLEST_NETWORK = 4


@dataclass(frozen=True)
class Saving:
    """How a training saves.

    Args:
        folder: of the checkpoints, ``step=N.ckpt``.
        form: ``"single"`` file or ``"sharded"`` directory.
        in_background: while the training goes on.
        every: how many steps.
    """

    folder: Path
    form: Literal["single", "sharded"] = "single"
    in_background: bool = False
    every: int = 2

    def path(self, step: int) -> Path:
        """Of the checkpoint after so many steps."""
        return self.folder / f"step={step}.ckpt"


@dataclass(frozen=True)
class Job:
    """A training, the same numbers under every layout.

    Args:
        network: of :data:`~lightning_dist.doctor.networks.NETWORKS`.
        settings: of the examination; the number of its ranks makes the size of the network and the batch.
        layout: None for Lightning's own strategy on one device.
        device_type: of the training.
        stop_after: steps.
        saving: None to save nothing.
        resume: the checkpoint to go on from.
    """

    network: str
    settings: Settings
    layout: str | None
    device_type: str
    stop_after: int = STEPS
    saving: Saving | None = None
    resume: Path | None = None

    @property
    def size(self) -> int:
        """Of what the axes divide."""
        return max(SMALLEST_NETWORK, self.settings.num_ranks)

    @property
    def batch_size(self) -> int:
        """Samples of a step, over all ranks."""
        return 2 * self.settings.num_ranks

    @property
    def num_data_ranks(self) -> int:
        """Of its layout."""
        layout = Layout.parse(self.layout)
        return 1 if layout is None else layout.resolve(self.settings.num_ranks).num_data_ranks


Piece = tuple[int, ...]
"""Where a piece of a gradient is in the whole; empty for the whole."""

Squares = dict[tuple[int, Piece], float]


@dataclass
class Record:
    """What a training left on one rank.

    Args:
        data_rank: ranks with the same one saw the same samples.
        losses: by step, over this rank's samples.
        squares: by step, the sum of squares of each piece of a gradient that this rank holds, before clipping, by the
            parameter's number and the place of the piece in it.
        weights: whole, after the last step.
    """

    data_rank: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    squares: dict[int, Squares] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


class Watch(Callback):
    """Notes losses, and gradients as this rank holds them; it communicates nothing."""

    def __init__(self) -> None:
        self.record = Record()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Before clipping."""
        with DisableTorchFunctionSubclass():
            self.record.squares[trainer.global_step + 1] = _squares(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """The loss of the step."""
        self.record.losses[trainer.global_step] = float(outputs["loss"])


def _squares(module: pl.LightningModule) -> Squares:
    numbers = {name: number for number, (name, _) in enumerate(module.named_parameters())}
    by_name = pieces_of_gradients(module)
    return {(numbers[name], piece): value for name, held in by_name.items() for piece, value in held.items()}


def pieces_of_gradients(module: nn.Module) -> dict[str, dict[Piece, float]]:
    """The sum of squares of each piece of a gradient that this rank holds, by the parameter's name."""
    found: dict[str, dict[Piece, float]] = {}
    for name, parameter in module.named_parameters():
        gradient = None if is_placeholder(parameter) else parameter.grad
        if gradient is None:
            continue
        piece, part = piece_of(gradient)
        found[name] = {piece: float(part.detach().double().square().sum())}
    return found


def piece_of(tensor: Tensor) -> tuple[Piece, Tensor]:
    """What this rank holds of a tensor, and where that is in the whole."""
    if not isinstance(tensor, DTensor):
        return (), tensor
    place = tensor.device_mesh.get_coordinate() or ()
    piece = tuple(c for c, p in zip(place, tensor.placements, strict=True) if not p.is_replicate())
    return piece, local_tensor(tensor)


class WrongWeight(Callback):
    """A fault for tests: after the first step, flips the sign of a weight of what this rank holds."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """At the second batch."""
        if index == 1:
            with DisableTorchFunctionSubclass(), torch.no_grad():
                held = (p for p in pl_module.parameters() if not is_placeholder(p))
                parts = (local_tensor(p) if isinstance(p, DTensor) else p.detach() for p in held)
                part = next(part for part in parts if part.numel())
                part.view(-1)[part.abs().argmax()] *= -1


def train(job: Job, *callbacks: Callback) -> Record:
    """Trains on this rank and the others that the environment names, or alone.

    Args:
        job: what.
        callbacks: beside those that measure.
    """
    warnings.simplefilter("ignore")
    rank = int(os.environ.get("RANK", 0))
    with suppress(ImportError):
        _limit_files(job.settings, rank)
    watch, faults = Watch(), [WrongWeight()] if job.settings.has_fault("wrong weight", rank) else []
    module = build(job.network, job.size)
    dataset = NETWORKS[job.network][1](STEPS_OF_EPOCH * job.batch_size)
    loader = DataLoader(dataset, batch_size=job.batch_size // job.num_data_ranks, shuffle=False)
    trainer = _trainer(job, rank, [*faults, watch, *callbacks, *_savers(job.saving)])
    trainer.fit(module, loader, ckpt_path=job.resume, weights_only=False)
    watch.record.data_rank = getattr(trainer.strategy, "data_rank", 0)
    watch.record.weights = {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
    return watch.record


def _trainer(job: Job, rank: int, callbacks: list[Callback]) -> pl.Trainer:
    saving = job.saving or Saving(Path())
    how: dict[str, Any]
    if job.layout is None:
        devices = 1 if job.device_type == "cpu" else [rank]
        how = {"devices": devices, "plugins": [LightningEnvironment()]}
    else:
        strategy = HybridStrategy(job.layout, checkpoint_format=saving.form, async_save=saving.in_background)
        how = {"devices": job.settings.num_ranks, "strategy": strategy}
    return pl.Trainer(
        accelerator=job.device_type,
        precision="64-true",
        max_steps=job.stop_after,
        max_epochs=-1,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=job.saving is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        **how,
    )


def _savers(saving: Saving | None) -> list[Callback]:
    if saving is None:
        return []
    return [ModelCheckpoint(saving.folder, "{step}", every_n_train_steps=saving.every, save_top_k=-1)]


def _limit_files(settings: Settings, rank: int) -> None:
    if settings.has_fault("full disk", rank):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
