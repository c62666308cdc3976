"""What an evaluation logs does not depend on the dtype of the weights: metrics and their sums are wide."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from recipes.credit_risk import credit_metrics
from recipes.image_classification import ImageClassifier
from recipes.language_model import CausalLM
from recipes.medicine import ScanClassifier
from recipes.pairs import PARTS, Pair
from recipes.sequence_to_sequence import PairData, Seq2Seq
from recipes.tables import RowClassifier
from tests.support.parity import QUIET

CLASSES = 16
SGD = partial(torch.optim.SGD, lr=0.1)


class Lookup(nn.Module):
    """Logits by the first number of a sample, or by each token: eighths, which 16 bits hold as they are."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        numbers = torch.arange(CLASSES * max(1, *shape, 0)).reshape(CLASSES, *shape)
        self.logits = nn.Parameter((numbers * 7 % 31 - 15) / 8)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.logits[inputs[-1].flatten(1)[:, 0].long()]


class Tokens(Lookup):
    """For each token."""

    def forward(self, tokens: Tensor) -> Any:
        return self.logits[tokens]


class Translations(Tokens):
    """As an encoder-decoder of transformers."""

    def forward(self, decoder_input_ids: Tensor, **given: Any) -> Any:  # type: ignore[override]
        states = self.logits.new_zeros(len(decoder_input_ids), 1)
        return SimpleNamespace(logits=super().forward(decoder_input_ids), encoder_last_hidden_state=states)


def drawn(count: int, *shape: int, most: int = CLASSES) -> Tensor:
    return torch.randint(most, (count, *shape), generator=torch.Generator().manual_seed(count))


def text(_: Path) -> tuple[L.LightningModule, Any]:
    batches = {"inputs": drawn(80, 9), "targets": drawn(80, 9).flip(0), "num_bytes": drawn(80) + 30}
    batches["unigram_micronats"] = batches["num_bytes"] * 1_500_001
    samples = [{name: values[i] for name, values in batches.items()} for i in range(80)]
    return CausalLM(partial(Tokens, CLASSES), SGD), DataLoader(samples, batch_size=2)  # type: ignore[arg-type]


def pairs(cache: Path) -> tuple[L.LightningModule, Any]:
    words = [[(i * 7 // 5**place) % 5 for place in range(1 + i % 3)] for i in range(150)]
    some = [Pair(" ".join(map(str, row)), " ".join("abcde"[word] * 3 for word in row)) for row in words]
    parts = {part: some for part in PARTS}
    lengths = {"max_source_length": 5, "max_target_length": 5, "batch_size": 4}
    data = PairData(otherwise=lambda: parts, tokens="words", vocab_size=CLASSES, cache=cache, **lengths)  # type: ignore[arg-type]
    return Seq2Seq(partial(Translations, CLASSES), SGD, max_length=5), data


def rows(_: Path) -> tuple[L.LightningModule, Any]:
    labels, categories = drawn(150, most=2).float(), drawn(150, 1)
    samples = [{"numbers": torch.zeros(1), "categories": categories[i], "label": labels[i]} for i in range(150)]
    return RowClassifier(Lookup, SGD, metrics=lambda: credit_metrics(5.0)), DataLoader(samples, batch_size=4)  # type: ignore[arg-type]


def images(kind: Callable[..., L.LightningModule], _: Path) -> tuple[L.LightningModule, Any]:
    samples = list(zip(drawn(90, 1, 1, 1).float(), drawn(90).flip(0), strict=True))
    return kind(partial(Lookup, CLASSES), SGD, num_classes=CLASSES), DataLoader(samples, batch_size=15)  # type: ignore[arg-type]


RECIPES = {
    "text": text, "pairs": pairs, "rows": rows, "scans": partial(images, ScanClassifier),
    "images": partial(images, ImageClassifier),
}  # fmt: skip


def figures(recipe: str, precision: Any, strategy: Any, tmp_path: Path) -> dict[str, float]:
    module, data = RECIPES[recipe](tmp_path)
    trainer = L.Trainer(**QUIET, devices=1, precision=precision, strategy=strategy)
    return {**trainer.validate(module, data, verbose=False)[0], **trainer.test(module, data, verbose=False)[0]}


@pytest.mark.parametrize("strategy", ["auto", "hybrid"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_figures_of_16_bit_weights_are_those_of_32(recipe: str, strategy: str, tmp_path: Path) -> None:
    expected = figures(recipe, "32-true", "auto", tmp_path)
    assert len(expected) >= 4
    chosen = HybridStrategy(layout={}) if strategy == "hybrid" else "auto"
    assert figures(recipe, "bf16-true", chosen, tmp_path) == pytest.approx(expected, rel=2e-6, abs=1e-6)


def test_nats_of_a_batch_may_be_more_than_float16_can_hold() -> None:
    samples = {"inputs": drawn(30_000), "targets": drawn(30_000).flip(0)}
    samples |= {"num_bytes": torch.tensor(90_000), "unigram_micronats": torch.tensor(1)}
    trainer = L.Trainer(**QUIET, devices=1, precision="16-true")
    module = CausalLM(partial(Tokens, CLASSES), SGD)
    logged = trainer.validate(module, DataLoader([samples]), verbose=False)[0]  # type: ignore[arg-type]
    logits = Tokens(CLASSES)(samples["inputs"])
    assert logged["val/loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, samples["targets"])), rel=1e-5)
