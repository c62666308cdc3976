"""What the user sees: the layout at the start, the pace of the training while it runs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.data import extract_batch_size
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from lightning_dist.layout import MESH_AXES, Layout

if TYPE_CHECKING:
    from lightning_dist.strategy import HybridStrategy

MEANING = {
    "pp": "stages of the network",
    "dp_replicate": "copies with different samples",
    "dp_shard": "shards of the states, different samples",
    "cp": "parts of a sequence",
    "tp": "parts of a layer",
}


@dataclass(frozen=True)
class LayoutReport:
    """The layout and what a rank holds of the module.

    Args:
        layout: resolved.
        reason: why ``"auto"`` chose it; empty where the user did.
        units: names of the modules that are sharded one by one.
        recomputed: names of the modules that compute their forward again in backward.
        checkpointing: how much of it: ``"full"`` or ``"selective"``; ``"none"``.
        num_parameters: of the whole module.
        whole_bytes: of the whole module's parameters.
        rank_bytes: of what this rank keeps of them between steps.
    """

    layout: Layout
    reason: str
    units: list[str]
    recomputed: list[str]
    checkpointing: str
    num_parameters: int
    whole_bytes: int
    rank_bytes: int

    @classmethod
    def of(cls, strategy: HybridStrategy) -> LayoutReport:
        """The report of a strategy that has set up its module."""
        module, layout = strategy.lightning_module, strategy.layout
        assert module is not None
        assert layout is not None
        parameters = list(module.parameters())
        return cls(
            layout=layout,
            reason=strategy.sharding_reason,
            units=strategy.sharded_units,
            recomputed=strategy.recomputed_blocks,
            checkpointing=strategy.activation_checkpointing,
            num_parameters=sum(p.numel() for p in parameters),
            whole_bytes=sum(p.numel() * p.element_size() for p in parameters),
            rank_bytes=sum(_local_bytes(p) for p in parameters),
        )

    def table(self) -> Table:
        """The report as a rich table."""
        table = Table(title="lightning_dist", title_justify="left")
        table.add_column("axis")
        table.add_column("degree", justify="right")
        table.add_column("what it splits")
        for axis in MESH_AXES:
            if (degree := getattr(self.layout, axis)) > 1:
                table.add_row(axis, str(degree), MEANING[axis])
        if self.layout.world_size == 1:
            table.add_row("one process", "1", "nothing")
        table.add_section()
        table.add_row("parameters", f"{self.num_parameters:,}", f"{_size(self.whole_bytes)} in all")
        share = self.rank_bytes / max(self.whole_bytes, 1)
        table.add_row("on this rank", _size(self.rank_bytes), f"{share:.1%} of the parameters")
        if self.units:
            table.add_row("sharded units", str(len(self.units)), _shorten(self.units))
        if self.recomputed:
            what = f"{self.checkpointing}: {_shorten(self.recomputed)}"
            table.add_row("recomputed in backward", str(len(self.recomputed)), what)
        if self.reason:
            table.add_row("auto", "", self.reason)
        return table

    def show(self, trainer: pl.Trainer) -> None:
        """Prints the table on rank 0, once a fit; not where the Trainer was asked for no summary."""
        quiet = not any(type(c).__name__.endswith("ModelSummary") for c in trainer.callbacks)  # type: ignore[attr-defined]
        if trainer.is_global_zero and trainer.training and not quiet:
            Console().print(self.table())


def _local_bytes(parameter: Tensor) -> int:
    own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return own.numel() * own.element_size()


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def _shorten(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... {names[-1]}"


class Throughput(Callback):
    """Logs samples per second, tokens per second where batches hold token ids, and the time of a step.

    Over all data ranks, averaged since the last time that the logger wrote (``log_every_n_steps``); shown in the
    progress bar and sent to the loggers as ``samples_per_second``, ``tokens_per_second`` and ``step_time`` (seconds).

    Communication: none; every data rank is taken to see as many samples as this one.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._start: float | None = None
        self._samples = self._tokens = self._batches = 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock anew: evaluation between epochs does not count."""
        self._reset()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock anew."""
        self._reset()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch; writes at the logger's pace. The first batch only starts the clock."""
        if self._start is None:
            self._start = time.perf_counter()
            return
        self._samples += extract_batch_size(batch)
        self._tokens += _num_tokens(batch)
        self._batches += 1
        every = getattr(trainer, "log_every_n_steps", 50) or 1
        if self._batches % every and not trainer.is_last_batch:
            return
        elapsed = time.perf_counter() - self._start
        ranks = getattr(trainer.strategy, "num_data_ranks", trainer.world_size)
        values = {
            "samples_per_second": self._samples * ranks / elapsed,
            "step_time": elapsed / self._batches * trainer.accumulate_grad_batches,
        }
        if self._tokens:
            values["tokens_per_second"] = self._tokens * ranks / elapsed
        for name, value in values.items():
            pl_module.log(name, value, prog_bar=True, on_step=True, on_epoch=False, batch_size=1)
        self._reset()
        self._start = time.perf_counter()


def _num_tokens(batch: Any) -> int:
    """Elements of the first tensor of integers with a batch and a sequence axis: token ids, where there are any."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim == 2 and leaf.dtype in (torch.int64, torch.int32):
            return leaf.numel()
    return 0
