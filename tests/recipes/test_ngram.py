"""The n-gram model that the language model stands beside, and what compressors make of the text."""

from __future__ import annotations

import gzip
import lzma
import math
from collections import Counter
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

from recipes.language_model import Baselines, CausalLM, TextData
from recipes.language_model.decoder import Decoder
from recipes.language_model.ngram import KneserNey
from recipes.language_model.sources import Document

Gram = tuple[int, ...]


class ByTheBook:
    """Interpolated Kneser-Ney by recursion over dictionaries."""

    def __init__(self, tokens: list[int], order: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        grams = Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))
        self.counts: dict[int, Counter[Gram]] = {order: grams}
        for length in range(order - 1, 0, -1):
            self.counts[length] = Counter(gram[1:] for gram in self.counts[length + 1])

    def probability(self, context: Gram, token: int) -> float:
        counts = self.counts[len(context) + 1]
        shorter = self.probability(context[1:], token) if context else 1 / self.vocab_size
        values = list(counts.values())
        discount = values.count(1) / (values.count(1) + 2 * values.count(2)) if 1 in values else 0.5
        following = {gram: count for gram, count in counts.items() if gram[:-1] == context}
        total = sum(following.values())
        if total == 0:
            return shorter
        own = max(counts[(*context, token)] - discount, 0) / total
        return own + discount * len(following) / total * shorter


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_are_those_of_the_book(order: int) -> None:
    draw = np.random.default_rng(0)
    tokens, tested = draw.zipf(1.5, 400) % 6, draw.zipf(1.5, 60) % 7  # the last token is never learned
    book = ByTheBook(tokens.tolist(), order, 7)
    expected = [
        -math.log(book.probability(tuple(tested[max(0, i - order + 1) : i].tolist()), int(tested[i])))
        for i in range(1, len(tested))
    ]
    np.testing.assert_allclose(KneserNey(tokens, order, 7).nats(tested), expected, rtol=1e-10)


def test_probabilities_of_all_tokens_sum_to_one() -> None:
    draw = np.random.default_rng(1)
    model = KneserNey(draw.zipf(1.5, 500) % 9, 3, 9)
    for context in draw.integers(0, 9, (20, 2)):
        last = [model.nats(np.append(context, token))[-1] for token in range(9)]
        assert sum(math.exp(-nats) for nats in last) == pytest.approx(1)


def test_an_order_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="grams of 6 tokens of 4096 don't fit 63 bits"):
        KneserNey(np.zeros(10, dtype=np.uint16), 6, 4096)


def test_a_language_model_stands_beside_an_ngram_and_compressors(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    words = ["tree ", "house ", "naïve ", "sea ", "the "]
    documents = [Document(f"{name}.txt {i}", "".join(draw.choice(words, 60))) for name in "ab" for i in range(6)]
    arguments = {"batch_size": 4, "sequence_length": 16, "cache": tmp_path, "test_documents": ["b.txt *"]}
    data = TextData(lambda: documents, vocab_size=300, val_fraction=0.2, **arguments)  # type: ignore[arg-type]
    module = CausalLM(lambda: Decoder(300, 16, 1, 2), lambda groups: torch.optim.AdamW(groups, 1e-3))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(accelerator="cpu", max_steps=2, callbacks=[Baselines(order=2)], **quiet)  # type: ignore[arg-type]
    trainer.fit(module, datamodule=data)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    corpus = data.corpus
    train, test = ("".join(corpus.decode(corpus.tokens[part].tolist())).encode() for part in ("train", "test"))
    assert sorted(test) == sorted("".join(d.text for d in documents if d.name.startswith("b")).encode())
    assert tested["test/gzip/loss_per_byte"] == pytest.approx(
        len(gzip.compress(test)) * 8 * math.log(2) / len(test), rel=1e-5
    )
    primed = len(lzma.compress(train + test)) - len(lzma.compress(train))
    assert tested["test/xz/loss_per_byte"] == pytest.approx(primed * 8 * math.log(2) / len(test), rel=1e-5)
    # five words, of which each is as probable as another
    per_byte = math.log(5) / np.mean([len(word.encode()) for word in words])
    assert per_byte < tested["test/ngram/loss_per_byte"] < 1.4 * per_byte
    assert tested["test/ngram/loss_per_byte"] < tested["test/unigram_loss_per_byte"]
