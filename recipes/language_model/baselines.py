"""What needs no network, beside it: an n-gram model of the same tokens, and compressors of the same text."""

from __future__ import annotations

import gzip
import lzma
import math
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback

from recipes.language_model.corpus import Corpus
from recipes.language_model.data import TextData
from recipes.language_model.ngram import KneserNey


def ngram_losses(corpus: Corpus, order: int) -> dict[str, float]:
    """``loss`` (nats per token) and ``loss_per_byte`` on the test text, of an interpolated Kneser-Ney model of the
    training text.
    """
    tokens = corpus.tokens["test"]
    nats = KneserNey(corpus.tokens["train"], order, len(corpus.token_bytes)).nats(tokens)
    return {"loss": float(nats.mean()), "loss_per_byte": float(nats.sum() / corpus.token_bytes[tokens[1:]].sum())}


def compressed_losses(corpus: Corpus) -> dict[str, float]:
    """Nats per byte of the test text that compressors need for it, by their names.

    ``xz`` has read the training text before: what it needs for both, less what it needs for that alone. ``gzip`` looks
    back 32 KB, within the test text, so nothing before it would help.
    """
    train, test = (corpus.decode(corpus.tokens[part].tolist()).encode() for part in ("train", "test"))
    sizes = {"gzip": len(gzip.compress(test)), "xz": len(lzma.compress(train + test)) - len(lzma.compress(train))}
    return {name: size * 8 * math.log(2) / len(test) for name, size in sizes.items()}


class Baselines(Callback):
    """Logs at the end of a test ``test/ngram/loss`` and ``loss_per_byte``, and the latter of ``gzip`` and ``xz``.

    Args:
        order: tokens of a gram.
    """

    def __init__(self, order: int = 4) -> None:
        self.order = order

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Computes them, on every rank alike."""
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, TextData):
            return
        for name, value in ngram_losses(data.corpus, self.order).items():
            pl_module.log(f"test/ngram/{name}", value)
        for name, value in compressed_losses(data.corpus).items():
            pl_module.log(f"test/{name}/loss_per_byte", value)
