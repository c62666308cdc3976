"""What can't work is said here, before any process group forms."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_dist.layout import Layout


def refuse(trainer: pl.Trainer, layout: Layout | None, device: torch.device) -> None:
    """Raises for a Trainer whose parts don't work together under the layout.

    Args:
        trainer: about to run.
        layout: resolved; None while ``"auto"`` is undecided, which is asked again when it is.
        device: of this rank.

    Raises:
        ValueError: what was asked, why not, and what would do.
    """
    _refuse_averaging(trainer, layout)
    _refuse_batchnorm(trainer, layout, device)


def _refuse_averaging(trainer: pl.Trainer, layout: Layout | None) -> None:
    if layout is None or not layout.holds_shards:
        return
    averaging = next((c for c in trainer.callbacks if _averages_weights(c)), None)  # type: ignore[attr-defined]
    if averaging is not None:
        raise ValueError(
            f"{type(averaging).__name__} keeps a whole copy of the weights on every rank, which layout "
            f"{layout} divides; use dp_replicate alone, or leave the callback out"
        )


def _averages_weights(callback: Callback) -> bool:
    names = {cls.__name__ for cls in type(callback).__mro__}
    return isinstance(callback, StochasticWeightAveraging) or "WeightAveraging" in names


def _refuse_batchnorm(trainer: pl.Trainer, layout: Layout | None, device: torch.device) -> None:
    if isinstance(getattr(trainer.strategy, "_layer_sync", None), TorchSyncBatchNorm) and device.type == "cpu":
        raise ValueError(
            "Trainer(sync_batchnorm=True) needs a GPU: torch's SyncBatchNorm does not run on the CPU; leave it out "
            "(each rank then normalises its own samples, as in ddp) or use accelerator='gpu'"
        )


def warn_of_axes_across_nodes(layout: Layout, ranks_per_node: int, num_nodes: int) -> None:
    """Warns where the ranks of a tp group are on several nodes: each layer waits for them."""
    if num_nodes > 1 and ranks_per_node % layout.tp:
        fitting = [degree for degree in range(1, ranks_per_node + 1) if ranks_per_node % degree == 0]
        rank_zero_warn(
            f"tp={layout.tp} on nodes of {ranks_per_node} ranks: every layer's collectives go between nodes, which is "
            f"slow. Degrees that stay inside a node: {', '.join(map(str, fitting))}"
        )
