"""Small stores of tokens, and a tokenizer to make them with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from lightning_dist.data import TokenStore
from lightning_dist.data.tokens.encode import Encoded
from lightning_dist.data.tokens.format import TOKENIZER, StoreIndex, write_index
from lightning_dist.data.tokens.writer import Journal, ShardsWriter, locked

END = "<|endoftext|>"


def train_tokenizer(path: Path, texts: Sequence[str], vocab_size: int = 400) -> tokenizers.Tokenizer:
    """A byte-level BPE in a file."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    tokenizer.save(str(path))
    return tokenizer


def write_store(
    folder: Path,
    documents: Sequence[np.ndarray],
    shard_tokens: int = 1 << 20,
    dtype: str = "uint16",
    tokenizer: str = "",
) -> TokenStore:
    """A store of documents that are tokens already, of a tokenizer that is any text."""
    folder.mkdir()
    (folder / TOKENIZER).write_text(tokenizer)
    index = StoreIndex(dtype, 1 << 15, {"tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest()}, ())
    with locked(folder) as file:
        journal = Journal(file, index.settings)
        writer = ShardsWriter(folder, journal, index.token_type, shard_tokens)
        for number, tokens in enumerate(documents):
            writer.add(Encoded(tokens, np.array([len(tokens)])), number)
        writer.finish(len(documents))
        write_index(folder, StoreIndex(dtype, index.vocab_size, index.settings, tuple(journal.shards)))
    return TokenStore(folder)


def numbered(folder: Path, num_tokens: int, document: int = 7, **options: object) -> TokenStore:
    """A store whose tokens are 0, 1, 2, ..., in documents of some lengths about one."""
    tokens, documents, start = np.arange(num_tokens), [], 0
    while start < num_tokens:
        stop = start + 1 + (start * 5 + 3) % (2 * document)
        documents.append(tokens[start:stop])
        start = stop
    return write_store(folder, documents, **options)  # type: ignore[arg-type]
