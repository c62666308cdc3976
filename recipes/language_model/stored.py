"""StoredText: blocks of token stores, of text of any size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dist.data import TokenDataset, TokenSampler, TokenStore
from recipes.language_model.corpus import Corpus
from recipes.language_model.data import IGNORED, BlockData


class StoredText(BlockData):
    """Token stores that ``lightning-dist tokenize`` wrote, with one byte-level tokenizer.

    Batches are those of :class:`recipes.language_model.data.TextData`; with ``documents`` they also have
    ``"positions"`` and ``"document_ids"``, see :class:`lightning_dist.data.TokenDataset`.

    Args:
        train: one or several stores.
        val, test: a store each.
        vocab_size: of the model, at least that of the stores' tokenizer.
        weights: of each training store in a mixture; by default every block comes once an epoch.
        window: blocks that are shuffled with each other.
        documents: keep attention within documents.
        sequence_length, batch_size, prompts, num_workers, eval_batch_size: see
            :class:`recipes.language_model.data.TextData`.

    Raises:
        ValueError: on ``setup``, stores of another or larger vocabulary.
    """

    def __init__(
        self,
        train: str | Path | Sequence[str | Path],
        val: str | Path,
        test: str | Path,
        vocab_size: int,
        sequence_length: int = 256,
        batch_size: int = 16,
        weights: Sequence[float] | None = None,
        window: int = 1 << 16,
        documents: bool = False,
        prompts: Sequence[str] = (),
        num_workers: int = 0,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__(sequence_length, batch_size, eval_batch_size, prompts, num_workers)
        self._train = [train] if isinstance(train, str | Path) else list(train)
        self._held_out = {"val": val, "test": test}
        self.vocab_size, self.weights, self.window, self.documents = vocab_size, weights, window, documents

    def setup(self, stage: str) -> None:
        """Opens the stores; on every process."""
        if self._corpus is None:
            self._corpus = StoredCorpus(
                TokenStore(self._train[0]), {part: TokenStore(path) for part, path in self._held_out.items()}
            )
            if (size := len(self._corpus.token_bytes)) > self.vocab_size:
                raise ValueError(
                    f"the tokenizer of {self._train[0]} has {size} tokens and data.vocab_size={self.vocab_size}; pass "
                    f"data.vocab_size={size}"
                )

    def train_dataloader(self) -> DataLoader:
        """Shuffled whole blocks; an incomplete last batch is dropped."""
        blocks = TokenDataset(self._train, self.sequence_length, documents=self.documents)
        sampler = TokenSampler(blocks, weights=self.weights, window=self.window)
        return self._loader(blocks, self.batch_size, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Every token of the validation store once."""
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader:
        """Every token of the test store once."""
        return self._evaluation("test")

    def _evaluation(self, part: str) -> DataLoader:
        return self._loader(
            MeasuredBlocks(self.corpus, part, self.sequence_length, self.documents), self.eval_batch_size
        )


class StoredCorpus(Corpus):
    """The tokenizer of stores, and their tokens.

    Args:
        train: whose token frequencies are the baseline.
        held_out: by part.

    Raises:
        ValueError: a store of another tokenizer.
    """

    def __init__(self, train: TokenStore, held_out: dict[str, TokenStore]) -> None:
        for store in held_out.values():
            if store.tokenizer_digest != train.tokenizer_digest:
                raise ValueError(f"{store.path} was made by another tokenizer than {train.path}; tokenize it with one")
        end = train.index.settings["end_of_document"]
        self._take(train.tokenizer_file, {"train": train, **held_out}, end)


class MeasuredBlocks(TokenDataset):
    """All blocks of a held-out part, with what their loss is compared with.

    Args:
        corpus: the stores.
        part: which of them.
        sequence_length, documents: see :class:`lightning_dist.data.TokenDataset`.
    """

    def __init__(self, corpus: Corpus, part: str, sequence_length: int, documents: bool) -> None:
        super().__init__(corpus.tokens[part], sequence_length, documents=documents, drop_last=False)
        self._corpus = corpus

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = super().__getitem__(index)
        targets = block["targets"].numpy()
        measures = self._corpus.measures(targets[targets != IGNORED])
        return block | {name: torch.tensor(value) for name, value in measures.items()}
