"""A run with a tensor axis is saved under the plain model's names and shapes, and goes on under any other layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy, Layout
from lightning_dist.checkpoint import convert
from recipes.image_classification import ImageClassifier
from recipes.image_classification.models import vision_transformer
from tests.recipes.runs import RUNS
from tests.support.parity import QUIET, Watch, slow
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

RANKS = {None: 1, "dp_shard=2": 2, "tp=2": 2, "tp=4": 4, "dp_shard=2,tp=2": 4, "dp_replicate=2,tp=2": 4}
CASES = [
    ("tp=2", "single", None),
    slow("tp=2", "auto", "tp=4"),
    ("dp_shard=2,tp=2", "auto", "tp=2"),
    slow("dp_shard=2,tp=2", "single", "dp_replicate=2,tp=2"),
    slow("dp_replicate=2,tp=2", "auto", "dp_shard=2"),
    slow("dp_shard=2", "auto", "dp_shard=2,tp=2"),
    slow(None, "auto", "dp_shard=2,tp=2"),
]


def classifier() -> L.LightningModule:
    """The recipe's, without the schedule that knows how many epochs are to come."""
    network = partial(vision_transformer, image_size=8, in_channels=1, num_classes=10)
    return ImageClassifier(network, partial(torch.optim.AdamW, lr=1e-3, eps=1e-6), num_classes=10)


def fit(folder: Path, layout: str | None, epochs: int, resume: Path | None, saved_as: str = "auto") -> list[float]:
    """Losses of the epochs that are trained here; leaves ``last.ckpt`` in the folder."""
    L.seed_everything(1, verbose=False)
    run = RUNS["image_classification"]
    world = dist.get_world_size() if dist.is_initialized() else 1
    strategy: Any = "auto" if layout is None else HybridStrategy(layout, checkpoint_format=saved_as)  # type: ignore[arg-type]
    watch = Watch()
    trainer = L.Trainer(
        **{**QUIET, "enable_checkpointing": True},
        devices=world,
        strategy=strategy,
        max_epochs=epochs,
        limit_train_batches=4,
        gradient_clip_val=1.0,
        callbacks=[watch, ModelCheckpoint(folder, save_last=True, save_top_k=0)],
    )
    ranks = 1 if layout is None else Layout.parse(layout).resolve(world).num_data_ranks  # type: ignore[union-attr]
    trainer.fit(classifier(), DataLoader(run.data(), batch_size=run.batch_size // ranks), ckpt_path=resume)
    return watch.losses


def on(layout: str | None, *args: Any) -> list[float]:
    return fit(*args) if layout is None else run_on_ranks(RANKS[layout], fit, *args)[0]


@pytest.mark.parametrize(("saving", "saved_as", "loading"), CASES)
def test_a_run_goes_on_under_another_layout(
    saving: str | None, saved_as: str, loading: str | None, tmp_path: Path
) -> None:
    whole = fit(tmp_path / "whole", None, 2, None)
    first = on(saving, tmp_path, saving, 1, None, saved_as)
    second = on(loading, tmp_path / "second", loading, 2, tmp_path / "last.ckpt")
    torch.testing.assert_close([*first, *second], whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["tp=2", slow("dp_shard=2,tp=2")])
def test_names_and_shapes_are_those_of_the_plain_model(layout: str, tmp_path: Path) -> None:
    fit(tmp_path / "plain", None, 1, None)
    on(layout, tmp_path, layout, 1, None)
    convert(tmp_path / "last.ckpt", tmp_path / "single.ckpt")
    plain, ours = (torch.load(tmp_path / name, weights_only=False) for name in ("plain/last.ckpt", "single.ckpt"))
    assert list(ours["state_dict"]) == list(plain["state_dict"])
    for name, expected in plain["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], expected, rtol=1e-4, atol=1e-5)
    for state, expected in zip(ours["optimizer_states"], plain["optimizer_states"], strict=True):
        for index, values in expected["state"].items():
            torch.testing.assert_close(state["state"][index]["exp_avg"], values["exp_avg"], rtol=1e-4, atol=1e-6)
