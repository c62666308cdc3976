"""A user's training on this rank, in one process or under a layout, and what it leaves to compare."""

from __future__ import annotations

import inspect
import os
import re
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from typing_extensions import override

from lightning_dist.compat.torch import DisableTorchFunctionSubclass
from lightning_dist.doctor.results import CheckFailed
from lightning_dist.doctor.training import Piece, piece_of, pieces_of_gradients
from lightning_dist.dtensors import full
from lightning_dist.layout import Layout
from lightning_dist.placeholder import is_placeholder
from lightning_dist.strategy import HybridStrategy
from lightning_dist.verify.activations import ActivationRecorder
from lightning_dist.verify.batches import BatchRecorder, Recorded, give_again
from lightning_dist.verify.callbacks import WatchersOff
from lightning_dist.verify.randomness import DropoutOff, StepWatch, switch_off_dropout

_MOST_BATCHES = 16
"""For each step of the optimizer."""

_PACKAGE = str(Path(__file__).parents[1])
_OWN = str(Path(__file__).parent)


@dataclass(frozen=True)
class Job:
    """A training.

    Args:
        make_module: makes the LightningModule; can be pickled.
        make_data: makes what it trains on; None for its own ``train_dataloader``.
        layout: None for Lightning's own strategy in one process.
        steps: of the optimizer.
        seed: before the module is made.
        precision: of the Trainer.
        device_type: of the ranks.
        trainer, strategy: more arguments of the Trainer and of the strategy.
        folder: where ranks leave tensors.
        batches: a file of what the steps are given, in place of the data's own.
        looked_at: the batch, by number, whose activations are left too.
        validation_batches: of each loader, after the steps; batches that are given are all taken.
    """

    make_module: Callable[[], pl.LightningModule]
    make_data: Callable[[], Any] | None
    layout: Layout | None
    steps: int
    seed: int
    precision: Any
    device_type: str
    trainer: Mapping[str, Any]
    strategy: Mapping[str, Any]
    folder: Path
    batches: Path | None = None
    looked_at: int | None = None
    validation_batches: int = 0


Pieces = dict[str, dict[Piece, float]]
"""The sum of squares of each piece of a gradient that this rank holds, by the parameter's name."""


@dataclass
class Record:
    """What a training left on one rank, beside files.

    Args:
        losses: by batch, over this rank's samples.
        squares: by step of an optimizer, before clipping.
        batch_of: which batch a step of an optimizer belongs to.
        start: sums of squares of the parameters before the first step.
        moved: before each step, and after the last, those of how far the parameters have moved from there.
        groups: of the optimizers' parameters, in words.
        logged: by name, and by what was the step when it was logged.
        draws: a step drew random numbers though dropout was off.
        coarsest: dtype of fewest bits in which something was computed.
        dropouts: names of dropout that was switched off.
        notes: what else was left out.
        buffers: names of those among the weights.
        validated: what the validation logged, by name; None where there was none.
        files: by what they have: ``"weights"``, ``"start"`` and ``"shares"`` (in one process, see :class:`Watch`),
            ``"batches"``, ``"activations"``, and in ``"changed"`` the weights that the validation changed.
    """

    losses: dict[int, float] = field(default_factory=dict)
    squares: list[Pieces] = field(default_factory=list)
    batch_of: list[int] = field(default_factory=list)
    start: Pieces = field(default_factory=dict)
    moved: list[Pieces] = field(default_factory=list)
    groups: dict[str, str] = field(default_factory=dict)
    logged: dict[str, dict[int, float]] = field(default_factory=dict)
    draws: bool = False
    coarsest: torch.dtype = torch.float64
    dropouts: set[str] = field(default_factory=set)
    notes: set[str] = field(default_factory=set)
    buffers: set[str] = field(default_factory=set)
    validated: dict[str, float] | None = None
    files: dict[str, Path] = field(default_factory=dict)

    def load(self, what: str) -> Any:
        """The content of a file."""
        return torch.load(self.files[what], weights_only=False, map_location="cpu")


class Watch(Callback):
    """Notes losses, and gradients and movements of the parameters as this rank holds them; it communicates nothing.
    Ends a training whose steps are skipped.

    Args:
        steps: of the optimizer, that the training is to have.
        keeps_start: the weights before the first step are kept whole, as one process has them, and of each entry's
            gradient how small it is beside the others of the weight in the step where it is smallest, but zero.
    """

    def __init__(self, steps: int, keeps_start: bool) -> None:
        self.record = Record()
        self.start: dict[str, Tensor] = {}
        self.shares: dict[str, Tensor] = {}
        self._steps, self._batch, self._keeps_start = steps, -1, keeps_start
        self._movement: _Movement | None = None

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._batch += 1
        if self._movement is None:
            self._movement = _Movement(pl_module)
            self.record.start = self._movement.squares_of_start()
            self.start = _weights(pl_module) if self._keeps_start else {}

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        with DisableTorchFunctionSubclass():
            self.record.squares.append(pieces_of_gradients(pl_module))
        if self._keeps_start:
            _note_shares(self.shares, pl_module)
        self.record.batch_of.append(self._batch)
        self.record.groups |= _groups(pl_module, optimizer)
        self._note_movement(pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._note_movement(pl_module)

    def _note_movement(self, module: pl.LightningModule) -> None:
        if self._movement is not None and (squares := self._movement.squares(module)) is not None:
            self.record.moved.append(squares)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self.record.losses[self._batch] = float(loss)
        if self._batch + 1 >= _MOST_BATCHES * self._steps * trainer.accumulate_grad_batches:
            trainer.should_stop = True


@torch.no_grad()
def _note_shares(shares: dict[str, Tensor], module: pl.LightningModule) -> None:
    for name, parameter in module.named_parameters():
        if parameter.grad is None or parameter.grad.is_sparse:
            continue
        gradient = parameter.grad.detach().cpu().double().abs()
        share = gradient / gradient.square().mean().sqrt()
        share = torch.where(gradient > 0, share, torch.inf).float()
        shares[name] = torch.minimum(shares.get(name, share), share)


class _Movement:
    """How far what this rank holds of the parameters has moved since this was made."""

    def __init__(self, module: pl.LightningModule) -> None:
        self._start = {name: (piece, part.clone()) for name, (piece, part) in _held(module).items()}

    def squares_of_start(self) -> Pieces:
        """Sums of squares."""
        return {name: {piece: float(part.square().sum())} for name, (piece, part) in self._start.items()}

    def squares(self, module: pl.LightningModule) -> Pieces | None:
        """Sums of squares; None while the rank holds other pieces, as FSDP does where it keeps gathered weights."""
        found = Pieces()
        for name, (piece, part) in _held(module).items():
            before = self._start.get(name)
            if before is None or before[0] != piece or before[1].shape != part.shape:
                return None
            found[name] = {piece: float((part - before[1]).square().sum())}
        return found


def _held(module: pl.LightningModule) -> dict[str, tuple[Piece, Tensor]]:
    with DisableTorchFunctionSubclass():
        pieces = {n: piece_of(p.detach()) for n, p in module.named_parameters() if not is_placeholder(p)}
        return {name: (piece, part.as_subclass(Tensor).cpu().double()) for name, (piece, part) in pieces.items()}


def _groups(module: pl.LightningModule, optimizer: Any) -> dict[str, str]:
    """Which of several groups of the optimizer a parameter is in."""
    groups = optimizer.param_groups
    found = {id(p): f" (group {number} of {len(groups)})" for number, g in enumerate(groups, 1) for p in g["params"]}
    return {name: found[id(p)] for name, p in module.named_parameters() if id(p) in found and len(groups) > 1}


class LoggedValues(DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, dict[int, float]] = defaultdict(dict)

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            if name != "epoch":
                self.values[name][-1 if step is None else step] = float(value)


def train(job: Job) -> Record:
    """Trains on this rank and the others that the environment names, or alone.

    Raises:
        CheckFailed: the layout is refused, before any optimizer has stepped, with ``refused`` among its details; or one
            process does not train.
    """
    warnings.simplefilter("ignore")
    watch = Watch(job.steps, job.layout is None)
    try:
        return _train(job, watch)
    except Exception as error:
        if job.layout is None:
            raise CheckFailed(_where_it_failed(error, job.precision), {"users": True}) from error
        if is_refusal(error) and not watch.record.squares:
            notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
            raise CheckFailed(" ".join(str(error).split()) + notes, {"refused": True}) from error
        raise


def _train(job: Job, watch: Watch) -> Record:
    rank = int(os.environ.get("RANK", 0))
    pl.seed_everything(job.seed, workers=True, verbose=False)
    module = job.make_module()
    if not isinstance(module, pl.LightningModule):
        raise ValueError(f"a {type(module).__name__} has no training_step; a LightningModule is what can be verified")
    dropout, watchers, step_watch = DropoutOff(), WatchersOff(module), StepWatch()
    dropout.found |= switch_off_dropout(module)
    logged, recorder = LoggedValues(), BatchRecorder()
    looking = [] if job.looked_at is None else [ActivationRecorder(job.looked_at)]
    alone = [step_watch] if job.layout is None else []
    trainer = _trainer(job, rank, [dropout, watchers, recorder, watch, *looking, *alone], logged)
    data = _data(job, module)
    if isinstance(data, pl.LightningDataModule):
        trainer.fit(module, datamodule=data)
    else:
        trainer.fit(module, data)
    record = watch.record
    record.logged = {**_at_the_end(trainer), **logged.values}
    record.buffers = {name for name, _ in module.named_buffers()}
    left: dict[str, Any] = {"weights": _weights(module), "batches": recorder.recorded}
    if watch.start:
        left |= {"start": watch.start, "shares": watch.shares}
    if looking:
        left["activations"] = looking[0].recorded
    elif job.validation_batches and all(_parts_of_validation(module, data)):
        record.validated = _validate(job, trainer, module, data)
        left["changed"] = _changed(left["weights"], _weights(module))
    record.draws, record.coarsest, record.dropouts = step_watch.draws, step_watch.coarsest, dropout.found
    record.notes = watchers.notes
    for what, value in left.items():
        record.files[what] = job.folder / f"{what}-{rank}.pt"
        torch.save(value, record.files[what])
    return record


def _data(job: Job, module: pl.LightningModule) -> Any:
    data = None if job.make_data is None else job.make_data()
    if data is None and not is_overridden("train_dataloader", module):
        raise ValueError("the module has no train_dataloader; give the data, with --data package.module:DataModule")
    if job.batches is None:
        return data
    recorded: Recorded = torch.load(job.batches, weights_only=False)
    return give_again(recorded, module, data)


def _parts_of_validation(module: pl.LightningModule, data: Any) -> tuple[bool, bool]:
    """Whether there is a step, and a loader for it."""
    holders = [module, data] if isinstance(data, pl.LightningDataModule) else [module]
    return is_overridden("validation_step", module), any(is_overridden("val_dataloader", holder) for holder in holders)


def _validate(job: Job, trainer: pl.Trainer, module: pl.LightningModule, data: Any) -> dict[str, float]:
    """Validates, and returns what is logged over all batches; single steps of ranks are of other batches."""
    trainer.limit_val_batches = job.validation_batches if job.batches is None else 1.0
    try:
        trainer.validate(module, verbose=False, datamodule=data if isinstance(data, pl.LightningDataModule) else None)
    except Exception as error:
        error.add_note(_IN_VALIDATION)
        raise
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {name: value for name, value in logged.items() if not _has_value_of_epoch(name, logged)}


def _has_value_of_epoch(name: str, logged: Mapping[str, float]) -> bool:
    """Whether this is of a step, beside which the value of the epoch is logged (``on_step=True, on_epoch=True``)."""
    head, _, last = name.rpartition("_")
    return "_".join((head if last == "step" else name, "epoch")) in logged


_IN_VALIDATION = "in the validation after the steps; --validation-batches 0 leaves it out"


def _changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in after.items() if name not in before or not torch.equal(value, before[name])}


def _weights(module: pl.LightningModule) -> dict[str, Tensor]:
    """The state dict as the fit left it, whole; without parameters of other stages. One all-gather for each tensor that
    is still divided, which torch does, but for those that a rank of ``tp`` has some pieces of.
    """
    state = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    with DisableTorchFunctionSubclass():
        held = {name: _whole(value.detach()) for name, value in state.items() if not is_placeholder(value)}
        return {name: value.as_subclass(Tensor).to("cpu", copy=True) for name, value in held.items()}


def _whole(value: Tensor) -> Tensor:
    if not isinstance(value, DTensor):
        return value
    is_plain = all(type(placement) in (Shard, Replicate) for placement in value.placements)
    return DTensor.full_tensor(value) if is_plain else full(value)


def _at_the_end(trainer: pl.Trainer) -> dict[str, dict[int, float]]:
    """What was logged for others than loggers too."""
    return {name: {trainer.global_step: float(value)} for name, value in trainer.callback_metrics.items()}


def _trainer(job: Job, rank: int, callbacks: list[Callback], logged: LoggedValues) -> pl.Trainer:
    how: dict[str, Any]
    if job.layout is None:
        how = {"devices": 1 if job.device_type == "cpu" else [rank], "plugins": [LightningEnvironment()]}
    else:
        how = {"devices": job.layout.world_size, "strategy": HybridStrategy(job.layout, **job.strategy)}
    ours = {"accelerator": job.device_type, "precision": job.precision, "max_steps": job.steps, "logger": logged}
    return pl.Trainer(**{**job.trainer, **_OURS, **ours, "callbacks": callbacks, "default_root_dir": job.folder, **how})


_OURS: dict[str, Any] = {
    "max_epochs": 1_000_000,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
_ALSO_OURS = {"accelerator", "callbacks", "default_root_dir", "devices", "fast_dev_run", "logger", "max_steps"}
_ALSO_OURS |= {"num_nodes", "plugins"}
_BY_OPTION = {"precision", "strategy"}


def validate_trainer(arguments: Mapping[str, Any]) -> None:
    """Raises a ValueError for arguments that the Trainer does not have, or that :func:`train` sets."""
    known = inspect.signature(pl.Trainer).parameters
    for name in arguments:
        if name not in known:
            raise ValueError(f"the Trainer has no {name!r}; it has {', '.join(known)}")
        if name in _BY_OPTION:
            raise ValueError(f"the Trainer's {name} has an option of its own; give it as {name}, not among trainer")
        if name in _ALSO_OURS or name in _OURS:
            raise ValueError(f"the Trainer's {name} is set by verify itself; leave it out of trainer")


def is_refusal(error: Exception) -> bool:
    """Whether it was raised here, in a sentence, and not by the user's code, or by what this package called."""
    frames = traceback.extract_tb(error.__traceback__)
    here = bool(frames) and frames[-1].filename.startswith(_PACKAGE) and not frames[-1].filename.startswith(_OWN)
    return here and (frames[-1].line or "").startswith("raise") and type(error) in (ValueError, RuntimeError)


def _where_it_failed(error: Exception, precision: Any) -> str:
    frames = list(traceback.extract_tb(error.__traceback__))
    # an error of torch has its last frame here too, where each of its functions is looked at
    if frames[-1].filename.startswith(_OWN) and (frames[-1].line or "").startswith("raise"):
        return str(error)
    users = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(_PACKAGE)]
    frame = (users or frames)[-1]
    first_line = str(error).strip().partition("\n")[0]
    does = "validate" if _IN_VALIDATION in getattr(error, "__notes__", ()) else "train"
    advice = "; leave it out with --validation-batches 0" if does == "validate" else ""
    if "64" in str(precision) and _OF_DTYPES.search(first_line):
        advice = "; it computes in float64 here, and with --precision 32-true in float32"
    return (
        f"the module does not {does} in one process, so there is nothing to compare: {type(error).__name__}: "
        f"{first_line} ({frame.filename}:{frame.lineno}, in {frame.name}){advice}"
    )


_OF_DTYPES = re.compile(r"dtype|scalar type|(input|data|bias|weight) type", re.IGNORECASE)
