"""What needs no network, beside it: the source as it is, and a translation word by word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from torchmetrics.functional.text import word_error_rate

from recipes.pairs import Pair
from recipes.sequence_to_sequence.data import PairData

NULL = ""
"""No word: what a source word is aligned with that has no target word."""


class WordByWord:
    """Translates each source word by its likeliest target word, by IBM Model 1 (Brown and others 1993,
    https://aclanthology.org/J93-2003): any target word of a pair may come from any of its source words.

    Args:
        pairs: to learn from.
        rounds: of expectation and maximisation.
    """

    def __init__(self, pairs: Sequence[Pair], rounds: int = 5) -> None:
        self._best = _likeliest([p.source.split() for p in pairs], [p.target.split() for p in pairs], rounds)

    def translate(self, source: str) -> str:
        """The translation of a source; what was never seen stays as it is."""
        words = (self._best.get(word, word) for word in source.split())
        return " ".join(word for word in words if word != NULL)


def _likeliest(sources: Sequence[Sequence[str]], targets: Sequence[Sequence[str]], rounds: int) -> dict[str, str]:
    """The likeliest target word of each source word."""
    unit_of = {unit: i for i, unit in enumerate(dict.fromkeys(u for units in sources for u in units))}
    word_of = {word: i for i, word in enumerate(dict.fromkeys([NULL, *(w for words in targets for w in words)]))}
    # Targets are filled up until they are as long, so that a source word may be left out.
    filled = [[*t, *[NULL] * (len(s) - len(t))] for s, t in zip(sources, targets, strict=True)]
    links = [
        (unit_of[u], word_of[w], group, number)
        for number, (units, words) in enumerate(zip(sources, filled, strict=True))
        for group, w in enumerate(words)
        for u in units
    ]
    units, words, places, numbers = np.asarray(links).T
    group = np.unique(numbers * (places.max() + 1) + places, return_inverse=True)[1]
    entry_of, entry = np.unique(units * len(word_of) + words, return_inverse=True)
    unit_of_entry = entry_of // len(word_of)
    probability = np.ones(len(entry_of))
    for _ in range(rounds):
        weights = probability[entry]
        weights /= np.bincount(group, weights)[group]
        counts = np.bincount(entry, weights)
        probability = counts / np.bincount(unit_of_entry, counts)[unit_of_entry]
    order = np.argsort(probability, kind="stable")
    best = dict(zip(unit_of_entry[order].tolist(), (entry_of[order] % len(word_of)).tolist(), strict=True))
    names = list(word_of)
    return {unit: names[best[i]] for unit, i in unit_of.items()}


class Baselines(Callback):
    """Logs at the end of a test ``word_error_rate`` and ``exact_match`` of ``test/copy``, the source itself, and
    of ``test/word_by_word``.

    Args:
        max_pairs: of training that the latter learns from.
    """

    def __init__(self, max_pairs: int = 20_000) -> None:
        self.max_pairs = max_pairs

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Computes them, on every rank alike."""
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, PairData):
            return
        known, tested = data.pairs["train"][: self.max_pairs], data.pairs["test"]
        by_word = WordByWord(known)
        translations = {
            "copy": [pair.source for pair in tested],
            "word_by_word": [by_word.translate(pair.source) for pair in tested],
        }
        for name, texts in translations.items():
            targets = [pair.target for pair in tested]
            pl_module.log(f"test/{name}/word_error_rate", float(word_error_rate(texts, targets)))
            same = [one == other for one, other in zip(texts, targets, strict=True)]
            pl_module.log(f"test/{name}/exact_match", sum(same) / len(same))
