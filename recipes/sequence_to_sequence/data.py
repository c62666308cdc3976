"""PairData: pairs of texts as padded tokens, to train an encoder-decoder on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipes.language_model.data import IGNORED
from recipes.pairs import PARTS, Pair, PairParts, padded, pair_parts
from recipes.parts import PartsData
from recipes.sequence_to_sequence.vocabulary import (
    PADDING,
    Kind,
    Vocabulary,
    build_vocabulary,
    read_vocabulary,
    vocabulary_file,
)

DEFAULT_CACHE = "~/.cache/lightning_dist/pairs"


class PairData(PartsData):
    """Pairs of texts in batches of tokens.

    Batches are ``{"sources", "source_mask", "inputs", "targets", "num_targets", "index"}``: tokens ``(batch, source
    length)`` int64 and 1 where they are none of padding, the decoder's inputs and targets ``(batch, target length)``,
    each with the end behind, targets of padding -100, how many targets each pair has, ``(batch,)``, and its place in
    its part, likewise.

    Args:
        path: a .tsv or .jsonl file; see :func:`recipes.pairs.pair_parts` for this and the next ones.
        otherwise: gives the parts where there is no path.
        val_path, test_path: files of their own.
        fields: names of the two columns.
        val_fraction, test_fraction: shares, where there are no such files.
        tokens: ``"bpe"``, or ``"words"`` for texts whose words are their symbols.
        vocab_size: most tokens of the vocabulary, which sources and targets share; the model has this many.
        max_source_length: tokens of a source, the end included. Longer ones are left out of training, and refused in
            evaluation.
        max_target_length: likewise, of a target.
        padding: ``"max_length"``: all batches have one shape, as a pipeline needs, which would be traced for each; or
            ``"longest"`` of the batch.
        batch_size: pairs per process and step.
        eval_batch_size: pairs per process and batch of evaluation, by default ``batch_size``.
        max_eval_pairs: of validation and of test at most, the first ones; null for all.
        cache: directory that keeps vocabularies.
        num_workers: processes that read ahead.

    Raises:
        ValueError: on ``setup``, a pair to evaluate that is too long.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        otherwise: Callable[[], PairParts] | None = None,
        val_path: str | Path | None = None,
        test_path: str | Path | None = None,
        fields: Sequence[str] = ("source", "target"),
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        tokens: Kind = "bpe",
        vocab_size: int = 4096,
        max_source_length: int = 64,
        max_target_length: int = 64,
        padding: Literal["max_length", "longest"] = "max_length",
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        max_eval_pairs: int | None = None,
        cache: str | Path = DEFAULT_CACHE,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, eval_batch_size)
        if padding not in ("max_length", "longest"):
            raise ValueError(f"data.padding={padding!r}; choose max_length or longest")
        shares = {"val_fraction": val_fraction, "test_fraction": test_fraction}
        self._read = lambda: pair_parts(
            path, otherwise, val_path=val_path, test_path=test_path, fields=fields, **shares
        )
        self.tokens, self.vocab_size = tokens, vocab_size
        self.max_lengths = max_source_length, max_target_length
        self.padding, self.max_eval_pairs, self.cache = padding, max_eval_pairs, Path(cache).expanduser()
        self.pairs: PairParts = {}
        self._vocabulary: Vocabulary | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        """Texts to tokens and back; there after ``setup``."""
        assert self._vocabulary is not None, "setup has not run"
        return self._vocabulary

    def prepare_data(self) -> None:
        """Makes the vocabulary of the training pairs, unless the cache has it; on one process per node."""
        build_vocabulary(self._read()["train"], self.tokens, self.vocab_size, self.cache)

    def setup(self, stage: str) -> None:
        """Reads and encodes the pairs; on every process."""
        if self.parts:
            return
        pairs = self._read()
        file = vocabulary_file(pairs["train"], self.tokens, self.vocab_size, self.cache)
        self._vocabulary = vocabulary = read_vocabulary(file)
        self.pairs = {part: pairs[part] if part == "train" else pairs[part][: self.max_eval_pairs] for part in PARTS}
        for part, chosen in self.pairs.items():
            self.parts[part] = EncodedPairs(vocabulary, chosen, self.max_lengths, is_strict=part != "train")

    def decode(self, tokens: Tensor) -> list[str]:
        """The texts of rows of tokens ``(rows, length)``."""
        return [self.vocabulary.decode(row) for row in tokens.tolist()]

    def references(self, batch: dict[str, Tensor]) -> list[str]:
        """The true targets of a test batch, also where they have words that the vocabulary lacks."""
        targets = [self.pairs["test"][index].target for index in batch["index"].tolist()]
        return [" ".join(target.split()) for target in targets] if self.tokens == "words" else targets

    def collate(self, pairs: Sequence[EncodedPair]) -> dict[str, Tensor]:
        """A batch of encoded pairs."""
        indices, sources, targets = map(list, zip(*pairs, strict=True))
        is_fixed = self.padding == "max_length"
        lengths = self.max_lengths if is_fixed else (max(map(len, sources)), max(map(len, targets)))
        tokens = padded(sources, lengths[0], PADDING)
        return {
            "sources": tokens,
            "source_mask": (tokens != PADDING).long(),
            # the decoder begins with the padding's token, and sees each target after it has said it
            "inputs": padded([[PADDING, *row[:-1]] for row in targets], lengths[1], PADDING),
            "targets": padded(targets, lengths[1], IGNORED),
            "num_targets": torch.tensor([len(row) for row in targets]),
            "index": torch.tensor(indices),
        }

    def _loader(self, part: str, batch_size: int, **arguments: object) -> DataLoader:
        return super()._loader(part, batch_size, collate_fn=self.collate, **arguments)


class EncodedPair(NamedTuple):
    """The place of a pair in its part, and its tokens."""

    place: int
    source: list[int]
    target: list[int]


class EncodedPairs(Dataset[EncodedPair]):
    """Tokens of the source and of the target of each pair.

    Args:
        vocabulary: encodes them.
        pairs: of texts.
        max_lengths: tokens of a source and of a target at most.
        is_strict: refuse a pair that is longer, else leave it out.

    Raises:
        ValueError: a pair that is too long, or none that is not.
    """

    def __init__(
        self, vocabulary: Vocabulary, pairs: Sequence[Pair], max_lengths: tuple[int, int], is_strict: bool
    ) -> None:
        sources = vocabulary.encode([pair.source for pair in pairs])
        targets = vocabulary.encode([pair.target for pair in pairs])
        every = list(map(EncodedPair, range(len(pairs)), sources, targets))
        self._encoded = [
            pair for pair in every if len(pair.source) <= max_lengths[0] and len(pair.target) <= max_lengths[1]
        ]
        left_out = len(every) - len(self._encoded)
        needed = [max(map(len, side)) for side in (sources, targets)]
        enough = f"data.max_source_length={needed[0]} data.max_target_length={needed[1]}"
        if left_out and (is_strict or not self._encoded):
            raise ValueError(
                f"{left_out} pairs to evaluate or train on are longer than {max_lengths} tokens; pass {enough}"
            )
        if left_out:
            rank_zero_info(
                f"{left_out} of {len(every)} training pairs are longer than {max_lengths} and left out; {enough}"
            )

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> EncodedPair:
        return self._encoded[index]
