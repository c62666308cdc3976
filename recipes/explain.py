"""The recipes as ``lightning-dist explain`` and ``verify`` take them: module, data and strategy of a config."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from hydra import compose, initialize_config_dir
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_dist.explain import Subject
from recipes import batches, job, targets
from recipes.config_errors import explain
from recipes.train import ROOT, allowed_targets, count_devices

IN_A_STEP = ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "sync_batchnorm")
"""Arguments of the Trainer that change what a rank holds in a step."""


def from_overrides(overrides: list[str]) -> Subject:
    """What ``python -m recipes.train`` would train with these overrides; pyproject.toml names this function.

    Raises:
        ValueError: the config can't be composed or built.
    """
    batches.register()
    try:
        with initialize_config_dir(str(ROOT / "conf"), **targets.VERSION_BASE):
            cfg = compose("config", overrides)
        num_ranks = count_devices(cfg.trainer.devices, cfg.trainer.accelerator) * cfg.trainer.num_nodes
        allowed = allowed_targets(overrides)
        with targets.allow(allowed):
            targets.check(cfg)
            strategy = targets.instantiate(OmegaConf.to_container(cfg.strategy, resolve=True), "strategy")
    except (CompactHydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from None

    def make() -> pl.LightningModule:
        with targets.allow(allowed):
            return job.build_module(cfg)

    def first_batch() -> Any:
        with targets.allow(allowed):
            return job.first_batch(cfg)

    def data() -> pl.LightningDataModule:
        with targets.allow(allowed):
            return job.build_data(cfg)

    trainer = {name: cfg.trainer[name] for name in IN_A_STEP if name in cfg.trainer}
    return Subject(make, strategy, num_ranks, first_batch, trainer, data)
