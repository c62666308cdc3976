"""A run that was saved under any layout goes on under any other with the losses of one that never stopped."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy, Layout
from recipes.image_classification import ImageClassifier
from recipes.image_classification.models import vision_transformer
from recipes.language_model import CausalLM
from recipes.language_model.decoder import Decoder
from recipes.optimization import warmup_cosine
from tests.recipes.runs import RUNS, VOCABULARY
from tests.support.parity import QUIET, slow
from tests.support.ranks import run_on_ranks

RANKS = {
    "dp_shard=1": 1,
    "dp_shard=2": 2,
    "dp_replicate=2": 2,
    "tp=2": 2,
    "pp=2": 2,
    "dp_shard=2,tp=2": 4,
    "pp=2,dp_shard=2": 4,
    "pp=2,tp=2": 4,
}
OPTIMIZERS: dict[str, Any] = {
    "adamw": partial(AdamW, lr=1e-3, weight_decay=0.05, eps=1e-6),
    "sgd": partial(SGD, lr=1e-2, momentum=0.9),
}
STEPS, STOP = 20, 10


def module_of(recipe: str, optimizer: str) -> L.LightningModule:
    if recipe == "image_classification":
        vit = partial(vision_transformer, image_size=8, in_channels=1, num_classes=10)
        return ImageClassifier(vit, OPTIMIZERS[optimizer], warmup_cosine, num_classes=10)
    decoder = partial(Decoder, VOCABULARY, width=32, depth=2, num_heads=4, num_kv_heads=2, tie_embedding=True)
    return CausalLM(decoder, OPTIMIZERS[optimizer], warmup_cosine)


class Watch(Callback):
    def __init__(self, path: Path | None) -> None:
        self.path, self.losses = path, list[float]()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach().clone())))
        if self.path is not None and trainer.global_step == STOP:
            trainer.save_checkpoint(self.path)


def losses(recipe: str, optimizer: str, layout: str, saves: Path | None, resumes: Path | None) -> list[float]:
    """Of the steps that are trained here."""
    L.seed_everything(1, verbose=False)
    watch, run = Watch(saves), RUNS[recipe]
    strategy = HybridStrategy(layout)
    trainer = L.Trainer(
        **QUIET,
        devices=RANKS[layout],
        strategy=strategy,
        max_steps=STEPS,
        gradient_clip_val=1.0,
        callbacks=[watch],
    )
    data_ranks = Layout.parse(layout).resolve(RANKS[layout]).num_data_ranks
    loader = DataLoader(run.data(), batch_size=run.batch_size // data_ranks, shuffle=True)
    trainer.fit(module_of(recipe, optimizer), loader, ckpt_path=resumes)
    return watch.losses


def on(recipe: str, optimizer: str, layout: str, saves: Path | None = None, resumes: Path | None = None) -> list[float]:
    if RANKS[layout] == 1:
        return losses(recipe, optimizer, layout, saves, resumes)
    return run_on_ranks(RANKS[layout], losses, recipe, optimizer, layout, saves, resumes)[0]


@cache
def one_process(recipe: str, optimizer: str) -> list[float]:
    return on(recipe, optimizer, "dp_shard=1")


def check(recipe: str, optimizer: str, saving: str, loading: list[str], folder: Path) -> None:
    one, path = one_process(recipe, optimizer), folder / f"{saving}.ckpt"
    whole = on(recipe, optimizer, saving, path)
    assert len(whole) == STEPS
    torch.testing.assert_close(whole, one, rtol=1e-5, atol=1e-6)
    for layout in loading:
        rest = on(recipe, optimizer, layout, None, path)
        if layout == saving:
            assert rest == whole[STOP:], f"{saving} -> {layout}"
        else:
            torch.testing.assert_close(
                rest, one[STOP:], rtol=1e-5, atol=1e-6, msg=lambda text, to=layout: f"{saving} -> {to}: {text}"
            )


@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        ("dp_shard=1", "pp=2"),
        slow("dp_replicate=2", "dp_shard=2,tp=2"),
        slow("pp=2,tp=2", "dp_shard=2"),
        slow("dp_shard=2,tp=2", "pp=2,dp_shard=2"),
    ],
)
def test_a_run_goes_on_under_another_layout(saving: str, loading: str, tmp_path: Path) -> None:
    check("language_model", "adamw", saving, [loading], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("saving", RANKS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("recipe", RUNS)
def test_a_run_goes_on_under_every_layout(recipe: str, optimizer: str, saving: str, tmp_path: Path) -> None:
    check(recipe, optimizer, saving, list(RANKS), tmp_path)
