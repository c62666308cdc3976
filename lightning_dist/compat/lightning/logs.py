"""Private names of Lightning around logged values, loops, loaders and finders."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from lightning.pytorch.tuner.lr_finder import _LRCallback
from lightning.pytorch.utilities.data import _extract_batch_size, _update_dataloader
from torch import Tensor

from lightning_dist.compat.names import hands_on, name_of, uses

# --- logged values: the logger connector and its results ---

_RESULT = "lightning.pytorch.trainer.connectors.logger_connector.result"
_CONNECTOR = "lightning.pytorch.trainer.connectors.logger_connector.logger_connector._LoggerConnector"

LoggerConnector = _LoggerConnector
ResultCollection = _ResultCollection
ResultMetric = _ResultMetric
Metadata = _Metadata
Sync = _Sync
hands_on(_CONNECTOR, "Says when somebody is about to read logged values.")
hands_on(f"{_RESULT}._ResultCollection", "Holds what a loop logs, by name.")
hands_on(f"{_RESULT}._ResultMetric", "Holds one logged value; made where only other ranks logged it.")
hands_on(f"{_RESULT}._Metadata", "How a value is logged; sent between ranks that log different names.")
hands_on(f"{_RESULT}._Sync", "How Lightning itself would reduce a logged value.")

EXTRACT_BATCH_SIZE = name_of(
    f"{_RESULT}._ResultCollection._extract_batch_size", "The method that finds by what a step's value is weighted."
)
TO_TENSOR = name_of(
    "lightning.pytorch.LightningModule._LightningModule__to_tensor", "The method by which log takes a number."
)
HOOK_CALLERS = frozenset(
    name_of(f"lightning.pytorch.trainer.call.{name}", "The function below which a hook of the user's runs.")
    for name in ("_call_callback_hooks", "_call_lightning_module_hook", "_call_strategy_hook")
)


@uses("lightning.pytorch.Trainer._logger_connector")
def logger_connector(trainer: pl.Trainer) -> Any:
    """What is told of batches and epochs, and reads logged values for loggers, callbacks and the progress bar."""
    return trainer._logger_connector


@uses("lightning.pytorch.Trainer._results", "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._results")
def results_of(owner: Any) -> ResultCollection | None:
    """What a loop has logged, or the loop of a trainer that runs; None where none runs."""
    results: ResultCollection | None = owner._results
    return results


@uses(f"{_CONNECTOR}._first_loop_iter")
def has_batches(trainer: pl.Trainer) -> bool:
    """Whether the epoch that runs has had a batch, as the logger connector sees it, and has not ended."""
    return trainer._logger_connector._first_loop_iter is not None


@uses(f"{_RESULT}._ResultMetric._forward_cache")
def step_value(metric: ResultMetric) -> Any:
    """The value of a step."""
    return metric._forward_cache


@uses(f"{_RESULT}._ResultMetric._forward_cache")
def set_step_value(metric: ResultMetric, value: Tensor | None) -> None:
    """Puts the value of a step that all ranks have together in place."""
    metric._forward_cache = value


@uses("torchmetrics.Metric._computed")
def set_epoch_value(metric: ResultMetric, value: Tensor | None) -> None:
    """Puts the value of an epoch that all ranks have together in place; None lets the metric compute it."""
    vars(metric)["_computed"] = value


@uses("torchmetrics.Metric._update_count")
def mark_logged(metric: ResultMetric) -> None:
    """Takes a value for logged here that maybe only other ranks logged."""
    metric._update_count = max(metric._update_count, 1)


@uses(f"{_RESULT}._ResultCollection._forked_name")
def epoch_names(results: ResultCollection, metric: ResultMetric) -> tuple[str, str]:
    """The names of the value of an epoch."""
    return results._forked_name(metric, on_step=False)


@uses(f"{_RESULT}._Sync._fn")
def leave_unreduced(meta: Metadata) -> None:
    """Keeps Lightning from reducing a logged value itself; its ``sync_dist`` stays to be seen."""
    meta.sync._fn = Sync.no_op


@uses(f"{_RESULT}._Metadata._sync", f"{_RESULT}._Sync._should")
def packed_metadata(meta: Metadata) -> dict[str, Any]:
    """How a value is logged, without what belongs to this process; see :func:`unpacked_metadata`."""
    fields = {name: getattr(meta, name) for name in meta.__dataclass_fields__ if name != "_sync"}
    return fields | {"should": meta.sync.should}


@uses(f"{_RESULT}._Sync._should")
def unpacked_metadata(packed: dict[str, Any]) -> Metadata:
    """What :func:`packed_metadata` packed on another rank."""
    meta = Metadata(**{name: value for name, value in packed.items() if name != "should"})
    meta.sync = Sync(_should=packed["should"])
    return meta


@uses(f"{_RESULT}._Sync._should")
def reduce_by(meta: Metadata, reduce: Any) -> None:
    """Gives a value the function by which Lightning would reduce it, which has to be the strategy's own, or it errs."""
    meta.sync = Sync(fn=reduce, _should=meta.sync.should)


@uses("lightning.pytorch.LightningModule._LightningModule__to_tensor")
def logged_tensor(device: torch.device, value: Any, name: str) -> Tensor:
    """The number that ``log`` takes of a value, without asking a module for its device."""
    to_tensor: Any = getattr(pl.LightningModule, TO_TENSOR)
    number: Tensor = to_tensor(SimpleNamespace(device=device), value, name)
    return number


@uses("lightning.pytorch.utilities.data._extract_batch_size")
def sizes_in_batch(batch: Any) -> Iterable[int | None]:
    """The sizes that Lightning finds in a batch, of each of its tensors."""
    return _extract_batch_size(batch)


@uses("lightning.pytorch.LightningModule._current_fx_name")
def running_hook(module: pl.LightningModule) -> str | None:
    """The name of the module's hook that Lightning runs now."""
    return module._current_fx_name


# --- loops ---

_FIT = "lightning.pytorch.loops.fit_loop._FitLoop"
_EPOCH = "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop"

SIGTERM_BROADCAST = name_of(f"{_EPOCH}._broadcast_sigterm_tensor", "The method that asks rank 0 whether to end.")
AUTOMATIC_STEP = name_of(
    "lightning.pytorch.loops.optimization.automatic._AutomaticOptimization._training_step",
    "The method that runs a training step, and refuses None over several processes.",
)
DATASET_LENGTH = name_of(
    "lightning.pytorch.utilities.CombinedLoader._dataset_length",
    "The method by which a finder knows the largest batch.",
)


@uses("lightning.pytorch.Trainer._active_loop")
def running_loop(trainer: pl.Trainer) -> Any:
    """The loop of the trainer that runs."""
    return trainer._active_loop


@uses(f"{_EPOCH}._is_training_done")
def is_at_last_step(trainer: pl.Trainer) -> bool:
    """Whether the training ends with the batch that runs."""
    return trainer.fit_loop.epoch_loop._is_training_done


@uses(f"{_EPOCH}._should_check_val_fx", f"{_FIT}._data_fetcher")
def validates_next(trainer: pl.Trainer) -> bool:
    """Whether a validation follows the training batch that runs."""
    fit = trainer.fit_loop
    assert fit._data_fetcher is not None
    return fit.epoch_loop._should_check_val_fx(fit._data_fetcher)


@uses("lightning.pytorch.trainer.setup._parse_time_interval_seconds")
def validates_by_the_clock(trainer: pl.Trainer) -> bool:
    """Whether validations come after a time (``val_check_interval="00:10:00"``), of which each rank has its own."""
    return trainer._val_check_time_interval is not None  # type: ignore[attr-defined]


@uses("lightning.pytorch.trainer.call._call_strategy_hook")
def call_training_step(trainer: pl.Trainer, *args: Any) -> Any:
    """Runs the strategy's ``training_step`` as Lightning does, under the profiler."""
    return call._call_strategy_hook(trainer, "training_step", *args)


# --- loaders ---

Stateful = _Stateful
IndexBatchSamplerWrapper = _IndexBatchSamplerWrapper
hands_on("lightning.fabric.utilities.types._Stateful", "Tells what Lightning saves the state of.")
hands_on("lightning.pytorch.overrides.distributed._IndexBatchSamplerWrapper", "Notes the indices while predicting.")


@uses("lightning.pytorch.utilities.data._update_dataloader")
def with_sampler(loader: Any, sampler: Any, stage: Any = None) -> Any:
    """A loader made as this one was, of the user's own class also, with another sampler."""
    return _update_dataloader(loader, sampler, mode=stage)


@uses("lightning.pytorch.overrides.distributed._IndexBatchSamplerWrapper._batch_sampler")
def without_index_wrapper(batch_sampler: Any) -> Any:
    """The batch sampler within Lightning's wrapper that notes indices; itself where it is none."""
    return getattr(batch_sampler, "_batch_sampler", batch_sampler)


# --- callbacks ---

LearningRateCallback = _LRCallback
hands_on("lightning.pytorch.tuner.lr_finder._LRCallback", "Sees the losses of the finder of a learning rate.")


@uses(
    "lightning.pytorch.callbacks.LearningRateFinder._early_exit",
    "lightning.pytorch.callbacks.BatchSizeFinder._early_exit",
)
def is_of_tuner(finder: Any) -> bool:
    """Whether a ``Tuner`` made the finder, which ends the run when it has its answer."""
    return bool(finder._early_exit)


# --- trainer and strategies ---


@uses("lightning.pytorch.Trainer._detect_anomaly")
def detects_anomaly(trainer: pl.Trainer) -> bool:
    """Whether the Trainer was asked to ``detect_anomaly``."""
    return bool(getattr(trainer, "_detect_anomaly", False))


@uses("lightning.pytorch.strategies.ParallelStrategy._layer_sync")
def layer_sync(strategy: Any) -> Any:
    """The plugin by which ``sync_batchnorm=True`` converts layers; None without."""
    return getattr(strategy, "_layer_sync", None)
