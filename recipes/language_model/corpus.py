"""Corpus: documents as tokens of a byte-level BPE trained on them, made once and kept on disk."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from recipes.language_model.sources import Document
from recipes.language_model.tokenizers_of_models import GivenTokenizer, bytes_of_tokens, id_of

PARTS = ("train", "val", "test")
END_OF_TEXT = "<|endoftext|>"
"""Stands before each document and after the last; predicting it counts, and it stands for no byte."""

UNIGRAM_TOKENS = 1 << 24
"""Of the training text, from which frequencies are counted at most."""

END = "end_of_text"
"""File of a corpus with the token that stands between documents."""

FORMAT = 2
"""Part of the cache's key: raise it when what is written changes."""


@dataclass(frozen=True)
class CorpusSettings:
    """What, beside the documents, decides the tokens.

    Args:
        vocab_size: most tokens of the vocabulary, the 256 bytes and the end of text included.
        val_fraction: share of the bytes that validation gets, by whole documents.
        test_fraction: the same for testing.
        test_documents: names of those to test on, with ``*`` for any characters, in place of a share.
        tokenizer: whose tokens to take, in place of training one: see :class:`GivenTokenizer`.

    Raises:
        ValueError: too small a vocabulary, or shares that leave no text to train on.
    """

    vocab_size: int
    val_fraction: float = 0.05
    test_fraction: float = 0.05
    test_documents: tuple[str, ...] = ()
    tokenizer: GivenTokenizer | None = None

    def __post_init__(self) -> None:
        if self.tokenizer is None and self.vocab_size < 257:
            raise ValueError(f"vocab_size={self.vocab_size} can't hold the 256 bytes and the end of text; pass 257 up")
        if min(self.val_fraction, self.test_fraction) <= 0 or self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"val_fraction={self.val_fraction} and test_fraction={self.test_fraction} must be positive and leave "
                "text to train on"
            )


class Corpus:
    """A tokenizer and the tokens of each part, read from a directory that :func:`build_corpus` wrote.

    Args:
        directory: see :func:`corpus_directory`.
    """

    def __init__(self, directory: Path) -> None:
        tokens = {part: np.load(directory / f"{part}.npy", mmap_mode="r") for part in PARTS}
        self._take(directory / "tokenizer.json", tokens, (directory / END).read_text("utf-8"))

    def _take(self, tokenizer: Path, tokens: Mapping[str, Any], end: str | None) -> None:
        """Keeps the tokens of each part, ``(n,)`` or what has slices of that; ``end`` is a token between documents."""
        self.tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer))
        self.tokenizer.encode_special_tokens = True
        self.tokens = tokens
        self.end_of_text = end
        self._first = [] if end is None else [id_of(self.tokenizer, end)]
        self.token_bytes = bytes_of_tokens(self.tokenizer, end)
        """UTF-8 bytes that each token stands for, ``(vocab_size,)``."""
        self.unigram_nats = _unigram_nats(self.tokens["train"][:UNIGRAM_TOKENS], len(self.token_bytes))
        """Loss of each token under its frequency in the training text, ``(vocab_size,)``."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that begins a document."""
        return [*self._first, *self.tokenizer.encode(text, add_special_tokens=False).ids]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without ends of text."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def measures(self, targets: np.ndarray) -> dict[str, int]:
        """What evaluation compares a loss with, of targets ``(n,)``: their UTF-8 bytes, and their loss under the token
        frequencies of the training text, in millionths.
        """
        nats = float(self.unigram_nats[targets].sum())
        return {"num_bytes": int(self.token_bytes[targets].sum()), "unigram_micronats": round(1e6 * nats)}


def corpus_directory(documents: Sequence[Document], settings: CorpusSettings, cache: Path) -> Path:
    """Where the corpus of these documents and settings is kept: a key of their content, so it is never stale."""
    key = hashlib.sha256()
    versions = {"format": FORMAT, "tokenizers": tokenizers.__version__}
    key.update(json.dumps({**asdict(settings), **versions}, sort_keys=True).encode())
    for document in documents:
        for piece in (document.name, document.text):
            encoded = piece.encode("utf-8")
            key.update(len(encoded).to_bytes(8, "little"))
            key.update(encoded)
    return cache / f"corpus-{key.hexdigest()[:24]}"


def build_corpus(documents: Sequence[Document], settings: CorpusSettings, cache: Path) -> Path:
    """Trains the tokenizer on the training documents and writes it and all tokens, if that is not done.

    The directory appears whole, by a rename: a process that is killed, or another one doing the same at the same
    time, leaves nothing half written to be read.

    Returns:
        The directory, for :class:`Corpus`.
    """
    directory = corpus_directory(documents, settings, cache)
    if directory.is_dir():
        return directory
    parts = split_documents(documents, settings)
    if settings.tokenizer is None:
        tokenizer, end = (
            train_tokenizer([document.text for document in parts["train"]], settings.vocab_size),
            END_OF_TEXT,
        )
    else:
        tokenizer, end = settings.tokenizer.load(), settings.tokenizer.end_of_text
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", dir=cache))
    try:
        unfinished.chmod(0o755)
        tokenizer.save(str(unfinished / "tokenizer.json"))
        (unfinished / END).write_text(end, encoding="utf-8")
        for part, texts in parts.items():
            np.save(unfinished / f"{part}.npy", _encode(tokenizer, texts, end))
        os.rename(unfinished, directory)
    except OSError:
        # Another process was first: what it wrote is the same.
        if not directory.is_dir():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def split_documents(documents: Sequence[Document], settings: CorpusSettings) -> dict[str, list[Document]]:
    """Whole documents for each part: those that are named, the others until they reach their share of the bytes.

    Raises:
        ValueError: too few documents for three parts, or none of such a name.
    """
    total = sum(document.num_bytes for document in documents)
    parts: dict[str, list[Document]] = {part: [] for part in PARTS}
    wanted = {"val": settings.val_fraction * total, "test": settings.test_fraction * total}
    for pattern in settings.test_documents:
        wanted["test"] = 0.0
        named = [document for document in documents if fnmatch.fnmatchcase(document.name, pattern)]
        if not named:
            names = ", ".join(sorted(document.name for document in documents)[:5])
            raise ValueError(f"no document is named {pattern!r} of data.test_documents; there are {names} and so on")
        parts["test"] += named
        documents = [document for document in documents if document not in named]
    for document in documents:
        part = next((name for name in wanted if wanted[name] > 0), "train")
        parts[part].append(document)
        if part in wanted:
            wanted[part] -= document.num_bytes
    empty = [part for part in PARTS if not parts[part]]
    if empty:
        raise ValueError(
            f"{len(documents)} documents of {total} bytes leave none for {' and '.join(empty)}: whole documents are "
            "held out, so pass more or smaller ones"
        )
    return parts


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE: lossless, since every byte is a token and nothing is normalised."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Text that happens to spell the special token is text.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _encode(tokenizer: tokenizers.Tokenizer, documents: Sequence[Document], end_of_text: str) -> np.ndarray:
    end = id_of(tokenizer, end_of_text)
    stream = [end]
    for encoding in tokenizer.encode_batch([document.text for document in documents], add_special_tokens=False):
        stream += [*encoding.ids, end]
    return np.asarray(stream, dtype=np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32)


def _unigram_nats(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    # The first token is only ever context. One is added, so that a token the training text lacks is possible.
    counts = np.bincount(tokens[1:], minlength=vocab_size) + 1.0
    return -np.log(counts / counts.sum())
