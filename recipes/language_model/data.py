"""TextData: blocks of tokens to train and evaluate on, and prompts to continue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipes.language_model.corpus import Corpus, CorpusSettings, build_corpus, corpus_directory
from recipes.language_model.sources import Document, Source
from recipes.language_model.tokenizers_of_models import GivenTokenizer

IGNORED = -100
"""Target of a position that does not count, as ``F.cross_entropy`` has it."""

DEFAULT_CACHE = "~/.cache/lightning_dist/text"


class BlockData(L.LightningDataModule):
    """What data modules of blocks share: loaders, prompts, and the corpus that ``setup`` gives.

    Args: see :class:`TextData`.
    """

    def __init__(
        self,
        sequence_length: int,
        batch_size: int,
        eval_batch_size: int | None,
        prompts: Sequence[str],
        num_workers: int,
    ) -> None:
        super().__init__()
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.prompts = list(prompts)
        self.num_workers = num_workers
        self._corpus: Corpus | None = None

    @property
    def corpus(self) -> Corpus:
        """Tokenizer and tokens; there after ``setup``."""
        assert self._corpus is not None, "setup has not run"
        return self._corpus

    def predict_dataloader(self) -> DataLoader:
        """One prompt per batch: they differ in length."""
        prompts = [torch.tensor(self.corpus.encode(prompt)) for prompt in self.prompts]
        return DataLoader(prompts, batch_size=1)  # type: ignore[arg-type]

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens ``(length,)``."""
        return self.corpus.decode(tokens.tolist())

    def _loader(self, blocks: Dataset, batch_size: int, **options: Any) -> DataLoader:
        return DataLoader(
            blocks,
            batch_size=batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.accelerator.is_available(),
            **options,
        )


class TextData(BlockData):
    """Tokens of a text, cut into blocks.

    Training batches are ``{"inputs", "targets"}``, both ``(batch, sequence_length)`` int64, the targets one token
    on. Evaluation batches cover every target of the held-out documents exactly once (the last block is padded with
    targets of -100) and also have ``"num_bytes"`` and ``"unigram_micronats"``, both ``(batch,)`` int64: the
    UTF-8 bytes that the block's targets stand for, and their loss under the token frequencies of the training
    text, in millionths (integers, because 16-bit precisions round every floating-point tensor of a batch).
    Batches of prediction are prompts, ``(1, length)`` int64.

    Args:
        source: reads the documents; see :mod:`recipes.language_model.sources`.
        vocab_size: most tokens of the vocabulary; the model has this many.
        sequence_length: targets per block.
        batch_size: blocks per process and step.
        val_fraction: share of the text that validation gets, by whole documents.
        test_fraction: the same for testing.
        test_documents: names of those to test on, with ``*`` for any characters, in place of a share.
        prompts: texts to continue in prediction.
        cache: directory that keeps tokenizers and tokens.
        num_workers: processes that read ahead; reading a block costs microseconds.
        eval_batch_size: blocks per process and batch of evaluation, by default ``batch_size``.
        tokenizer: directory of a tokenizer of transformers to take, as a model to fine-tune needs; ``vocab_size`` then
            does not count. Default: one is trained on the text.
    """

    def __init__(
        self,
        source: Source,
        vocab_size: int = 4096,
        sequence_length: int = 256,
        batch_size: int = 16,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        prompts: Sequence[str] = (),
        cache: str | Path = DEFAULT_CACHE,
        num_workers: int = 0,
        eval_batch_size: int | None = None,
        test_documents: Sequence[str] = (),
        tokenizer: str | Path | None = None,
    ) -> None:
        super().__init__(sequence_length, batch_size, eval_batch_size, prompts, num_workers)
        self._source, self.tokenizer_directory = source, tokenizer
        self._shares = val_fraction, test_fraction, tuple(test_documents)
        self._vocab_size = vocab_size
        if tokenizer is None:
            self._settings()  # says what can't be, before anything is read
        self.cache = Path(cache).expanduser()
        self._documents: list[Document] | None = None

    def prepare_data(self) -> None:
        """Trains the tokenizer and writes the tokens, unless the cache has them; on one process per node."""
        build_corpus(self._read(), self._settings(), self.cache)

    def setup(self, stage: str) -> None:
        """Maps the tokens from the cache; on every process."""
        if self._corpus is None:
            directory = corpus_directory(self._read(), self._settings(), self.cache)
            if not directory.is_dir():
                raise FileNotFoundError(
                    f"{directory} is not there: prepare_data wrote another text, or to another machine; give every "
                    "node the same text, and a cache of its own or a shared one"
                )
            self._corpus = Corpus(directory)
            self._documents = None

    def train_dataloader(self) -> DataLoader:
        """Shuffled whole blocks; an incomplete last batch is dropped."""
        blocks = TokenBlocks(self.corpus, "train", self.sequence_length)
        return self._loader(blocks, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Every token of the validation documents once."""
        return self._loader(TokenBlocks(self.corpus, "val", self.sequence_length), self.eval_batch_size)

    def test_dataloader(self) -> DataLoader:
        """Every token of the test documents once."""
        return self._loader(TokenBlocks(self.corpus, "test", self.sequence_length), self.eval_batch_size)

    def _settings(self) -> CorpusSettings:
        given = None if self.tokenizer_directory is None else GivenTokenizer.read(self.tokenizer_directory)
        return CorpusSettings(self._vocab_size, *self._shares, tokenizer=given)

    def _read(self) -> list[Document]:
        if self._documents is None:
            self._documents = self._source()
        return self._documents


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """A part of a corpus in blocks of ``sequence_length`` targets, each with the token before it as first input.

    Args:
        corpus: the tokens.
        part: ``"train"``, whose incomplete last block is left out, or ``"val"`` or ``"test"``, where it is padded.
        sequence_length: targets per block.

    Raises:
        ValueError: the training part is shorter than a block.
    """

    def __init__(self, corpus: Corpus, part: str, sequence_length: int) -> None:
        self.corpus = corpus
        self.part = part
        self.sequence_length = sequence_length
        num_targets = len(corpus.tokens[part]) - 1
        self._length = num_targets // sequence_length
        if part != "train":
            self._length = -(-num_targets // sequence_length)
        elif self._length == 0:
            raise ValueError(
                f"the training text has {num_targets} tokens and sequence_length={sequence_length}; pass more text or "
                "a shorter length"
            )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._length:
            raise IndexError(f"block {index} of {self._length}")
        start = index * self.sequence_length
        tokens = self.corpus.tokens[self.part][start : start + self.sequence_length + 1].astype(np.int64)
        padding = self.sequence_length + 1 - len(tokens)
        block = {
            "inputs": torch.from_numpy(np.pad(tokens[:-1], (0, padding))),
            "targets": torch.from_numpy(np.pad(tokens[1:], (0, padding), constant_values=IGNORED)),
        }
        if self.part != "train":
            block |= {name: torch.tensor(value) for name, value in self.corpus.measures(tokens[1:]).items()}
        return block
