"""PromptCompletionData: what to answer to what, of which only the answer is learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipes.language_model.corpus import Corpus
from recipes.language_model.data import IGNORED, BlockData
from recipes.language_model.tokenizers_of_models import TOKENIZER, GivenTokenizer, id_of
from recipes.pairs import PARTS, Pair, PairParts, pair_parts


class PromptCompletionData(BlockData):
    """Prompts and their completions, for fine-tuning: the loss is that of the completion and the end of text after it.

    Batches are ``{"inputs", "targets", "num_targets"}``: tokens ``(batch, sequence_length)`` int64, padded behind, the
    targets one token on and -100 where they are of a prompt or of padding, and how many count, ``(batch,)``. Those of
    evaluation also have ``"num_bytes"`` and ``"unigram_micronats"``, see :class:`recipes.language_model.data.TextData`.
    A causal model needs no mask of the padding: what counts stands before it.

    Args:
        tokenizer: directory of a tokenizer of transformers, that of the model.
        path: a .jsonl or .tsv file; see :func:`recipes.pairs.pair_parts` for this and the next ones.
        otherwise: gives the parts where there is no path.
        val_path, test_path: files of their own.
        fields: names of the two columns.
        val_fraction, test_fraction: shares, where there are no such files.
        sequence_length: targets that a pair may have, its prompt included; longer pairs are refused.
        batch_size: pairs per process and step.
        eval_batch_size: pairs per process and batch of evaluation, by default ``batch_size``.
        prompts: to be completed in prediction, by default the first of the test.
        num_workers: processes that read ahead.

    Raises:
        ValueError: on ``setup``, a pair that is too long. An empty text is one like any other.
    """

    def __init__(
        self,
        tokenizer: str | Path,
        path: str | Path | None = None,
        otherwise: Callable[[], PairParts] | None = None,
        val_path: str | Path | None = None,
        test_path: str | Path | None = None,
        fields: Sequence[str] = ("prompt", "completion"),
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        sequence_length: int = 256,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        prompts: Sequence[str] = (),
        num_workers: int = 0,
    ) -> None:
        super().__init__(sequence_length, batch_size, eval_batch_size, prompts, num_workers)
        self.tokenizer_directory = tokenizer
        shares = {"val_fraction": val_fraction, "test_fraction": test_fraction}
        self._pairs = lambda: pair_parts(
            path, otherwise, val_path=val_path, test_path=test_path, fields=fields, **shares
        )
        self._parts: dict[str, Completions] = {}

    def prepare_data(self) -> None:
        """Reads the files once, so that what is wrong with them is told before ranks meet."""
        GivenTokenizer.read(self.tokenizer_directory)
        self._pairs()

    def setup(self, stage: str) -> None:
        """Encodes the pairs; on every process."""
        if self._corpus is not None:
            return
        pairs = self._pairs()
        self._corpus = corpus = CompletionCorpus(self.tokenizer_directory, pairs["train"])
        self._parts = {part: Completions(corpus, pairs[part], self.sequence_length, part) for part in PARTS}
        self.prompts = self.prompts or [pair.source for pair in pairs["test"][:4]]

    def train_dataloader(self) -> DataLoader:
        """Shuffled pairs; an incomplete last batch is dropped."""
        return self._loader(self._parts["train"], self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Every validation pair once."""
        return self._loader(self._parts["val"], self.eval_batch_size)

    def test_dataloader(self) -> DataLoader:
        """Every test pair once."""
        return self._loader(self._parts["test"], self.eval_batch_size)


class CompletionCorpus(Corpus):
    """The tokenizer of a model, and the tokens of completions.

    Args:
        tokenizer: its directory.
        train: pairs whose completions' token frequencies are the baseline.
    """

    def __init__(self, tokenizer: str | Path, train: Sequence[Pair]) -> None:
        given = GivenTokenizer.read(tokenizer)
        loaded = given.load()
        completions = loaded.encode_batch([pair.target for pair in train], add_special_tokens=False)
        end = id_of(loaded, given.end_of_text)
        stream = [end, *(token for encoding in completions for token in (*encoding.ids, end))]
        self._take(Path(tokenizer).expanduser() / TOKENIZER, {"train": np.asarray(stream)}, given.end_of_text)
        self.end = end

    def encode_pair(self, pair: Pair) -> tuple[list[int], int]:
        """End of text, prompt, completion and end of text; and how many of these tokens are given."""
        given = self.encode(pair.source)
        return [*given, *self.tokenizer.encode(pair.target, add_special_tokens=False).ids, self.end], len(given)


class Completions(Dataset[dict[str, Tensor]]):
    """The pairs of a part, padded to one length.

    Args:
        corpus: encodes them.
        pairs: prompts and completions.
        sequence_length: targets of each.
        part: ``"train"``, ``"val"`` or ``"test"``.

    Raises:
        ValueError: a pair is too long.
    """

    def __init__(self, corpus: CompletionCorpus, pairs: Sequence[Pair], sequence_length: int, part: str) -> None:
        self._corpus, self._length, self._part = corpus, sequence_length, part
        self._encoded = [corpus.encode_pair(pair) for pair in pairs]
        longest = max(len(tokens) for tokens, _ in self._encoded) - 1
        if longest > sequence_length:
            raise ValueError(
                f"a pair of the {part} part has {longest} targets and data.sequence_length={sequence_length}; pass "
                f"data.sequence_length={longest}, or leave such pairs out of the file"
            )

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens, num_given = self._encoded[index]
        inputs, targets = np.zeros(self._length, np.int64), np.full(self._length, IGNORED, np.int64)
        inputs[: len(tokens) - 1] = tokens[:-1]
        learned = np.asarray(tokens[num_given:])
        targets[num_given - 1 : len(tokens) - 1] = learned
        numbers = {"num_targets": len(learned)}
        if self._part != "train":
            numbers |= self._corpus.measures(learned)
        pair = {"inputs": torch.from_numpy(inputs), "targets": torch.from_numpy(targets)}
        return pair | {name: torch.tensor(value) for name, value in numbers.items()}
