"""One job on one rank: build what the config names, fit, test, predict, and say how it went."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from recipes import targets
from recipes.config_errors import ConfigError, told_without_traceback
from recipes.experiments import Band

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, float]:
    """Builds the job that ``cfg`` describes and runs the phases that it asks for (``train, test, predict``).

    Communication: what Lightning and the strategy do; every rank of the job calls it with the same config.

    Args:
        cfg: the resolved config of the job.

    Returns:
        the logged metrics of all phases by name, and ``seconds``, the time that the phases took.

    Raises:
        ConfigError: something can't be built from what the config says.
    """
    if cfg.seed is not None:
        pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data = build_data(cfg)
    module = build_module(cfg)
    trainer = _build_trainer(cfg)

    started = time.perf_counter()
    metrics: dict[str, float] = {}
    if cfg.train and cfg.test_first:
        trainer.test(module, datamodule=data, ckpt_path=_begun_from(cfg), verbose=False)
        metrics |= {f"first/{name}": value for name, value in _numbers(trainer.callback_metrics).items()}
    if cfg.train:
        trainer.fit(module, datamodule=data, ckpt_path=cfg.ckpt_path)
        metrics |= _numbers(trainer.callback_metrics)
    weights = _weights(cfg, trainer)
    if cfg.test:
        trainer.test(module, datamodule=data, ckpt_path=weights, verbose=False)
        metrics |= _numbers(trainer.callback_metrics)
    predictions = trainer.predict(module, datamodule=data, ckpt_path=weights) if cfg.predict else None
    metrics["seconds"] = time.perf_counter() - started

    if trainer.is_global_zero:
        _report(cfg, metrics, predictions)
    return metrics


def _build(name: str, node: DictConfig, **arguments: Any) -> Any:
    with told_without_traceback(name):
        return targets.instantiate(node, name, **arguments)  # See [Note: targets]


def build_module(cfg: DictConfig) -> pl.LightningModule:
    """The LightningModule of a config."""
    parts = {name: _build(name, cfg.get(name)) for name in ("model", "optimizer", "scheduler") if name in cfg}
    return _build("recipe", cfg.recipe, **parts)


def build_data(cfg: DictConfig) -> pl.LightningDataModule:
    """The LightningDataModule of a config."""
    return _build("data", cfg.data)


def first_batch(cfg: DictConfig) -> Any:
    """The first batch of a config's training data."""
    data = build_data(cfg)
    data.prepare_data()
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def _build_trainer(cfg: DictConfig) -> pl.Trainer:
    loggers = _build_all("logger", cfg.logger)
    callbacks = _build_all("callbacks", cfg.callbacks)
    if not loggers:
        # Lightning refuses this one without a logger, and `logger=none` should be enough to say.
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    if OmegaConf.select(cfg, "model.path") is not None and "pretrained" not in cfg.strategy:
        raise ConfigError(
            "model.path: the weights of that directory are read by strategy=hybrid, and another strategy would begin "
            "from initial ones; take strategy=hybrid, whose layout dp_replicate=-1 does what ddp does"
        )
    strategy = _build("strategy", cfg.strategy)
    return _build("trainer", cfg.trainer, strategy=strategy, callbacks=callbacks, logger=loggers or False)


def _build_all(group: str, nodes: DictConfig | None) -> list[Any]:
    return [_build(f"{group}.{name!s}", node) for name, node in (nodes or {}).items() if node is not None]


def _weights(cfg: DictConfig, trainer: pl.Trainer) -> str | None:
    """The checkpoint to test and predict with, ``None`` for the weights at hand."""
    if not cfg.train:
        return cfg.ckpt_path or _begun_from(cfg)
    checkpoint = trainer.checkpoint_callback
    if cfg.weights == "best" and isinstance(checkpoint, ModelCheckpoint):
        return checkpoint.best_model_path or None
    return None


def _begun_from(cfg: DictConfig) -> str | None:
    """The weights that training begins from, if they are not the module's own."""
    return cfg.strategy.get("pretrained")


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _report(cfg: DictConfig, metrics: dict[str, float], predictions: Sequence[Any] | None) -> None:
    console = Console()
    for text in _texts(predictions):
        console.print(text, markup=False, highlight=False)
        console.rule()
    table = Table(title="Result")
    table.add_column("metric")
    table.add_column("measured", justify="right")
    table.add_column("expected", justify="right")
    expected = cfg.get("expected")
    for name, value in metrics.items():
        if name.endswith(("_step", "_epoch")):
            continue
        table.add_row(name, _digits(name, value), _verdict(expected, name, value))
    console.print(table)


def _digits(name: str, value: float) -> str:
    """Four decimals of a share of 1, else four digits."""
    return f"{value:.4f}" if name.endswith("/accuracy") else f"{value:.4g}"


def _texts(predictions: Sequence[Any] | None) -> list[str]:
    """What there is to read among the predictions of all batches; a language model predicts text."""
    flat: list[Any] = []
    for batch in predictions or []:
        flat.extend(batch if isinstance(batch, (list, tuple)) else [batch])
    return [item for item in flat if isinstance(item, str)]


def _verdict(expected: DictConfig | None, name: str, value: float) -> str:
    if expected is None or expected.metric != name:
        return ""
    values: Any = expected
    band = Band(**values)
    return f"{band}: {'reached' if band.holds(value) else 'missed'}"
