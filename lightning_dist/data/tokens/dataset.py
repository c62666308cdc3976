"""TokenDataset: token stores cut into blocks of one length, with what attention needs to stay within documents."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_dist.data.tokens.store import TokenStore

IGNORED = -100
"""Target of a position that does not count, as ``F.cross_entropy`` has it."""


class TokenDataset(Dataset[dict[str, Tensor]]):
    """Blocks of the streams of token stores, the stores one after the other; each target is in one block.

    A block is ``{"inputs", "targets"}``, both ``(sequence_length,)`` int64, the targets one token on. It may hold
    several documents, and parts of them. With ``documents`` it also has, ``(sequence_length,)`` int64 each,

    - ``"positions"``: of each input in its document, from 0 where the document or the block begins;
    - ``"document_ids"``: 0 for the inputs of the block's first document, and so on; for
      :func:`~lightning_dist.data.document_mask` and :func:`~lightning_dist.data.document_mask_mod`.

    The target of a document's last token is what follows in the stream, with or without.

    Args:
        stores: one or several, or their directories.
        sequence_length: targets of a block.
        documents: whether documents are told apart.
        drop_last: leave out what is left of a store after the last whole block; else that is one more block, filled up
            with inputs of 0 and targets of -100.

    Raises:
        ValueError: stores of different tokenizers, or one that has no block.
    """

    def __init__(
        self,
        stores: str | os.PathLike[str] | TokenStore | Sequence[str | os.PathLike[str] | TokenStore],
        sequence_length: int,
        *,
        documents: bool = False,
        drop_last: bool = True,
    ) -> None:
        given = [stores] if isinstance(stores, str | os.PathLike | TokenStore) else stores
        self.stores = [store if isinstance(store, TokenStore) else TokenStore(store) for store in given]
        self.sequence_length, self.documents = sequence_length, documents
        if sequence_length < 1 or not self.stores:
            raise ValueError(f"sequence_length={sequence_length} must be at least 1, and one store has to be named")
        for store in self.stores[1:]:
            if store.tokenizer_digest != self.stores[0].tokenizer_digest:
                raise ValueError(
                    f"{store.path} was made by another tokenizer than {self.stores[0].path}, so the same number is "
                    "another text in each; tokenize them with one"
                )
        rounding = 0 if drop_last else sequence_length - 1
        self.blocks_of_stores = [max(0, len(store) - 1 + rounding) // sequence_length for store in self.stores]
        """How many blocks each store has."""
        for store, count in zip(self.stores, self.blocks_of_stores, strict=True):
            if not count:
                raise ValueError(
                    f"{store.path} has {len(store)} tokens, which is no block of sequence_length={sequence_length} "
                    "targets; pass a shorter length or more text"
                )
        self._ends = np.cumsum(self.blocks_of_stores)

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer: one more than its largest token."""
        return self.stores[0].vocab_size

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        which = int(np.searchsorted(self._ends, index, side="right"))
        store, before = self.stores[which], int(self._ends[which]) - self.blocks_of_stores[which]
        start = (int(index) - before) * self.sequence_length
        tokens = store[start : start + self.sequence_length + 1].astype(np.int64)
        padding = self.sequence_length + 1 - len(tokens)
        block = {
            "inputs": torch.from_numpy(np.pad(tokens[:-1], (0, padding))),
            "targets": torch.from_numpy(np.pad(tokens[1:], (0, padding), constant_values=IGNORED)),
        }
        return block | self._documents_of(store, start) if self.documents else block

    def _documents_of(self, store: TokenStore, start: int) -> dict[str, Tensor]:
        stop = min(start + self.sequence_length, len(store))
        starts = store.document_starts(start + 1, stop) - start
        ids = np.zeros(self.sequence_length, np.int64)
        ids[starts] = 1
        ids = np.cumsum(ids)
        positions = np.arange(self.sequence_length) - np.concatenate([[0], starts])[ids]
        return {"positions": torch.from_numpy(positions), "document_ids": torch.from_numpy(ids)}
