"""What a training epoch has logged so far, for a run that goes on within it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from lightning_dist.compat import lightning as private
from lightning_dist.compat.torchmetrics import set_num_updates
from lightning_dist.logs.reductions import name_of_reduction
from lightning_dist.pytree import map_leaves


def logged_so_far(trainer: pl.Trainer) -> dict[str, Any]:
    """Of this rank: numbers that the epoch accumulates, and those that callbacks and schedulers read last, in strings
    and tensors, which Lightning replaces when it adds to them. A ``torchmetrics.Metric`` keeps its own state, which is
    not taken.
    """
    results: Any = private.results_of(trainer.fit_loop.epoch_loop)
    epoch = {}
    for key, metric in results.valid_items():
        if metric.is_tensor and metric.meta.on_epoch:
            packed = private.packed_metadata(metric.meta)
            packed["reduce_fx"] = name_of_reduction(packed["reduce_fx"])
            weight = metric.cumulated_batch_size if metric.meta.is_mean_reduction else None
            epoch[key] = {"meta": packed, "value": metric.value, "weight": weight}
    last = dict(private.callback_metrics_of(private.logger_connector(trainer)))
    return {"epoch": epoch, "last": last}


def restore_logged(trainer: pl.Trainer, state: dict[str, Any]) -> list[str]:
    """Puts back what :func:`logged_so_far` gave, before the first batch; the keys of the values of the epoch."""
    results: Any = private.results_of(trainer.fit_loop.epoch_loop)
    connector, device = private.logger_connector(trainer), trainer.strategy.root_device
    for key, saved in state["epoch"].items():
        meta = private.unpacked_metadata(saved["meta"])
        private.reduce_by(meta, trainer.strategy.reduce)
        metric = private.ResultMetric(meta, is_tensor=True)
        metric.value = saved["value"]
        if saved["weight"] is not None:
            metric.cumulated_batch_size = saved["weight"]
        set_num_updates(metric, 1)
        results[key] = metric.to(device)
    private.callback_metrics_of(connector).update(map_leaves(state["last"], lambda _, value: value.to(device)))
    private.set_has_batches(connector, False)
    return list(state["epoch"])


def on_host(_: Any, value: Any) -> Any:
    """For :func:`map_leaves`."""
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value
