"""Runs of the recipes, twenty steps each on data that is small."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from recipes.credit_risk import credit_metrics
from recipes.driving import Highway, ImitationModule, SensorTransformer
from recipes.driving.data import Decisions
from recipes.image_classification import Digits, ImageClassifier
from recipes.image_classification.models import vision_transformer
from recipes.language_model import CausalLM
from recipes.language_model.decoder import Decoder
from recipes.medicine import ResNet3D, ScanClassifier
from recipes.optimization import warmup_cosine
from recipes.sequence_to_sequence import Seq2Seq
from recipes.sequence_to_sequence.models import transformers_seq2seq
from recipes.tables import RowClassifier
from recipes.tables.data import Rows
from recipes.tables.models import ColumnTransformer
from recipes.tables.table import Encoding
from tests.support.parity import Run

VOCABULARY, LENGTH = 64, 16


def vit() -> L.LightningModule:
    """The vision transformer of the default run."""
    network = partial(vision_transformer, image_size=8, in_channels=1, num_classes=10)
    # The bias of the keys has no gradient but rounding (softmax does not see a shift of all its scores), which AdamW
    # scales up to whole steps; eps keeps that rounding small.
    optimizer = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.99), eps=1e-6)
    return ImageClassifier(network, optimizer, warmup_cosine, num_classes=10, label_smoothing=0.1)


def digits() -> Dataset:
    """The first digits that the recipe trains on, as they are."""
    data = Digits(shift=0)
    data.prepare_data()
    data.setup("fit")
    return Subset(data.train_dataloader().dataset, range(320))


def held_out_digits() -> Dataset:
    """Some that it validates on; 37 divides by nothing here."""
    data = Digits()
    data.prepare_data()
    data.setup("fit")
    return Subset(data.val_dataloader().dataset, range(37))


def decoder() -> L.LightningModule:
    """A small decoder with a tied embedding and grouped queries."""
    network = partial(Decoder, VOCABULARY, width=32, depth=2, num_heads=4, num_kv_heads=2, tie_embedding=True)
    return CausalLM(network, partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05), warmup_cosine)


def uneven_decoder() -> L.LightningModule:
    """One whose vocabulary and feed-forward divide by nothing, trained by SGD."""
    network = partial(Decoder, VOCABULARY + 3, width=32, depth=2, num_heads=4, num_kv_heads=2, feed_forward_width=45)
    return CausalLM(network, partial(torch.optim.SGD, lr=0.1))


class Blocks(Dataset):
    """Blocks of tokens, in the form of the recipe's data module."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(count)
        tokens = torch.randint(VOCABULARY, (count, LENGTH + 1), generator=generator)
        self.blocks = TensorDataset(tokens)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        (tokens,) = self.blocks[index]
        count = torch.tensor(3 * LENGTH + index % 5)
        return {
            "inputs": tokens[:-1],
            "targets": tokens[1:],
            "num_bytes": count,
            "unigram_micronats": count * 2_000_000,
        }


def scorer() -> L.LightningModule:
    """A transformer over few columns, without dropout."""
    network = partial(ColumnTransformer, 2, 2, 10, dropout=0.0)
    optimizer = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05, eps=1e-6)
    return RowClassifier(network, optimizer, warmup_cosine, metrics=partial(credit_metrics, 5.0))


def applicants(count: int) -> Dataset:
    """Some of whose values are missing."""
    rows: list[dict[str, Any]] = [
        {
            "age": None if index % 7 == 0 else 20 + 13 * index % 50,
            "amount": 100 * (index % 11),
            "purpose": ["car", "house", "boat", None][index % 4],
            "has_phone": ["yes", "no"][index // 3 % 2],
        }
        for index in range(count)
    ]
    encoding = Encoding(["age", "amount"], ["purpose", "has_phone"])
    encoding.learn(rows)
    return Rows(rows, encoding, [int((index % 11 + index % 4) > 7) for index in range(count)])


def scan_classifier() -> L.LightningModule:
    """A residual network over small volumes."""
    network = partial(ResNet3D, 1, 3, widths=(8, 16), groups=4)
    return ScanClassifier(network, partial(torch.optim.AdamW, lr=1e-3, eps=1e-6), warmup_cosine, num_classes=3)


def scans(count: int) -> Dataset:
    """Volumes whose mean tells their class."""
    labels = torch.arange(count) % 3
    noise = torch.randn(count, 1, 6, 6, 6, generator=torch.Generator().manual_seed(count))
    return TensorDataset(noise + labels[:, None, None, None, None], labels)


def driver() -> L.LightningModule:
    """A small network that drives by an occupancy grid and vehicles."""
    network = partial(SensorTransformer, Highway(), width=32, depth=2)
    return ImitationModule(network, partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05, eps=1e-6), warmup_cosine)


def decisions(count: int) -> Dataset:
    """Of a driver who goes where the grid is emptier."""
    generator = torch.Generator().manual_seed(count)
    length, side = Highway().grid_shape
    grids = torch.randn(count, 4, length, side, generator=generator)
    vehicles = torch.randn(count, Highway().num_seen, 5, generator=generator)
    return Decisions(grids, vehicles, grids[:, 0].mean(1).argmin(1))


def translator() -> L.LightningModule:
    """A small T5."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    network = partial(transformers_seq2seq, "t5", vocab_size=VOCABULARY, dropout_rate=0.0, **sizes)
    optimizer = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05, eps=1e-6)
    return Seq2Seq(network, optimizer, warmup_cosine, generate=False)


class Sentences(Dataset):
    """Pairs of very different lengths, long ones together: ranks have different numbers of targets."""

    def __init__(self, count: int) -> None:
        self.generator = torch.Generator().manual_seed(count)
        self.tokens = torch.randint(3, VOCABULARY, (count, 2, LENGTH), generator=self.generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        source, target = self.tokens[index]
        length = LENGTH if index // 4 % 2 else 2 + index % 3
        mask = (torch.arange(LENGTH) < LENGTH - length // 2).long()
        is_target = torch.arange(LENGTH) < length
        return {
            "sources": source * mask,
            "source_mask": mask,
            "inputs": torch.cat((torch.zeros(1, dtype=torch.long), target[:-1])) * is_target,
            "targets": torch.where(is_target, target, -100),
            "num_targets": is_target.sum(),
        }


RUNS = {
    "image_classification": Run(vit, digits, held_out_digits, batch_size=16, trainer={"gradient_clip_val": 1.0}),
    "credit_risk": Run(
        scorer, partial(applicants, 320), partial(applicants, 37), batch_size=16, trainer={"gradient_clip_val": 1.0}
    ),
    "medicine": Run(
        scan_classifier, partial(scans, 320), partial(scans, 37), batch_size=16, trainer={"gradient_clip_val": 1.0}
    ),
    "driving": Run(
        driver, partial(decisions, 320), partial(decisions, 37), batch_size=16, trainer={"gradient_clip_val": 1.0}
    ),
    "sequence_to_sequence": Run(
        translator, partial(Sentences, 320), partial(Sentences, 37), batch_size=16, trainer={"gradient_clip_val": 1.0}
    ),
    "language_model": Run(
        decoder, partial(Blocks, 320), partial(Blocks, 37), batch_size=16, trainer={"gradient_clip_val": 1.0}
    ),
}
