"""One training of a case, and all that is compared of it."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils.data import DataLoader, DistributedSampler

import lightning_dist
from lightning_dist import HybridStrategy
from tests.support.device import device_type
from tests.user_code.case import BATCH_SIZE, LAYOUTS, PIPELINES, SCHEDULES, Case, num_data_ranks
from tests.user_code.measure import Part, part_of


@dataclass
class Record:
    """What a training left on one rank.

    Args:
        losses: of each step, of this rank's samples; None where the step gave none.
        gradients: of each step of an optimizer, by name of parameter.
        logged: at the end, ``trainer.callback_metrics``.
        logger: all that a logger received.
        seen: what the case itself looked at.
        tensors: parameters and buffers at the end, or when it failed.
        error: why it ended; empty if it did not fail.
        refuses: whether that was said by the product.
    """

    losses: list[float | None] = field(default_factory=list)
    gradients: list[dict[str, Part]] = field(default_factory=list)
    logged: dict[str, float] = field(default_factory=dict)
    logger: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)
    tensors: dict[str, Part] = field(default_factory=dict)
    error: str = ""
    refuses: bool = False


class Recorder(Callback):
    """Notes losses and gradients without communicating: parts are put together when all is over."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self.record.losses.append(None if loss is None else float(loss))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        held = [p for group in optimizer.param_groups for p in group["params"]]
        self.record.gradients.append(
            {
                names.get(id(p), f"parameter {i}"): part_of(p.grad)
                for i, p in enumerate(held)
                if not _is_elsewhere(p) and p.grad is not None
            }
        )


class Memory(Logger):
    """A logger of every rank."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    name, version = "memory", 0  # type: ignore[assignment]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.record.logger.append((step or 0, {name: float(value) for name, value in metrics.items()}))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def train(case: Case, layout: str | None) -> Record:
    """Trains on the ranks that are there.

    Args:
        case: of the suite.
        layout: its short name; ``"ddp"`` is Lightning's own; None is one process.
    """
    record = Record()
    L.seed_everything(1, verbose=False)
    torch.set_default_dtype(torch.float32)
    module = case.module()
    callbacks = case.callbacks()
    try:
        _fit(case, layout, module, callbacks, record)
    except Exception as error:
        record.error = "\n".join([_one_line(error), *getattr(error, "__notes__", ())])
        record.refuses = _is_ours(error)
    for owner in (module, *callbacks):
        record.seen += getattr(owner, "seen", [])
    record.tensors = {**_parts(module, "parameters"), **_parts(module, "buffers")}
    return record


def _fit(case: Case, layout: str | None, module: L.LightningModule, callbacks: list[Callback], record: Record) -> None:
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    strategy: Any = "auto" if layout is None else layout
    layouts = {**LAYOUTS, **PIPELINES}
    if layout in layouts:
        schedule = {"pipeline_schedule": SCHEDULES[layout]} if layout in SCHEDULES else {}
        strategy = HybridStrategy(layouts[layout], **schedule, **case.strategy)
    # Lightning's ddp would shuffle an unshuffled loader: bring its sampler
    ranks = world if layout == "ddp" else 1 if layout is None else num_data_ranks(layout)
    train_loader = case.train(BATCH_SIZE // ranks)
    if layout == "ddp":
        sampler = DistributedSampler(train_loader.dataset, shuffle=False)
        train_loader = DataLoader(train_loader.dataset, BATCH_SIZE // ranks, sampler=sampler)
    arguments: dict[str, Any] = {
        "accelerator": device_type(),
        "devices": world,
        "precision": case.precision,
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": Memory(record),
        **case.trainer,
        "callbacks": [Recorder(record), *callbacks],
        "strategy": strategy,
    }
    trainer = L.Trainer(**arguments)
    trainer.fit(module, train_loader, None if case.val is None else case.val(BATCH_SIZE // ranks))
    record.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}


def start(case: Case) -> dict[str, Tensor]:
    """What a training begins from."""
    L.seed_everything(1, verbose=False)
    module = case.module()
    return {name: part.local for kind in ("parameters", "buffers") for name, part in _parts(module, kind).items()}


def _parts(module: nn.Module, kind: str) -> dict[str, Part]:
    named = getattr(module, f"named_{kind}")()
    return {name: part_of(tensor) for name, tensor in named if not (_is_lazy(tensor) or _is_elsewhere(tensor))}


def _is_lazy(tensor: Tensor) -> bool:
    return isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))


def _is_elsewhere(tensor: Tensor) -> bool:
    """Whether another stage of a pipeline holds it: it has no memory here."""
    return isinstance(tensor, FakeTensor) or isinstance(getattr(tensor, "data", None), FakeTensor)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _is_ours(error: Exception) -> bool:
    """Whether a line of the product raised it, on purpose; or the error ends with what such a line said on another
    rank.
    """
    if any(note.startswith("another rank ended before: ") for note in getattr(error, "__notes__", ())):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.filename.startswith(str(Path(lightning_dist.__file__).parent)) and str(last.line).startswith("raise ")
