"""Batches of one size on any number of ranks: ``${per_data_rank:128}`` of a config is each data rank's share of 128."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

NAME = "per_data_rank"


def register() -> None:
    """Makes the resolver known to OmegaConf; again does no harm."""
    OmegaConf.register_new_resolver(NAME, per_data_rank, replace=True)


def per_data_rank(total: int, *, _root_: DictConfig) -> int:
    """The samples of a batch for each of the ranks that see different ones.

    Args:
        total: samples of all ranks together.

    Raises:
        ValueError: they can't be dealt evenly, or the layout doesn't fit the ranks.
    """
    num_ranks = num_data_ranks(_root_)
    if total % num_ranks:
        raise ValueError(
            f"a batch of {total} samples can't be dealt to {num_ranks} data ranks evenly; choose another layout, or "
            "pass the samples of each rank as data.batch_size=..."
        )
    return total // num_ranks


def num_data_ranks(cfg: DictConfig) -> int:
    """The ranks of a config's run that see different samples."""
    from lightning_dist.elastic import Rendezvous
    from lightning_dist.layout import Layout
    from recipes.train import count_devices

    launcher: Any = cfg.launcher
    nodes = cfg.trainer.num_nodes
    if launcher.get("nnodes") is not None:  # machines that join on their own
        nodes *= Rendezvous.parse(launcher.nnodes, launcher.rdzv_endpoint, launcher.rdzv_id).max_nodes
    num_ranks = nodes * count_devices(cfg.trainer.devices, cfg.trainer.accelerator)
    value: Any = cfg.strategy.get("layout")
    layout = Layout.parse(dict(value) if OmegaConf.is_dict(value) else value)
    return num_ranks if layout is None else layout.resolve(num_ranks).num_data_ranks
