"""One vocabulary for sources and targets: words as they stand, or a byte-level BPE."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from recipes.pairs import Pair

PADDING, END, UNKNOWN = 0, 1, 2
"""Numbers of special tokens; the decoder begins with the padding, as T5's does."""

SPECIAL = ["<pad>", "</s>", "<unk>"]

Kind = Literal["bpe", "words"]

FORMAT = 1
"""Part of the cache's key: raise it when what is written changes."""


class Vocabulary:
    """Texts to tokens and back.

    Args:
        tokenizer: of :func:`train_vocabulary`.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, with the end."""
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [[*encoding.ids, END] for encoding in encoded]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens up to the end, if there is one; ``<unk>`` stands for each that is unknown."""
        kept = list(tokens)
        kept = kept[: kept.index(END)] if END in kept else kept
        return self._tokenizer.decode([token for token in kept if token != PADDING], skip_special_tokens=False)


def train_vocabulary(pairs: Sequence[Pair], kind: Kind, vocab_size: int) -> tokenizers.Tokenizer:
    """A tokenizer of the sources and targets of pairs.

    Args:
        pairs: to train on.
        kind: ``"bpe"``, which is lossless, or ``"words"``: what stands between spaces, the most frequent ones.
        vocab_size: most tokens.

    Raises:
        ValueError: another kind, or too small a vocabulary.
    """
    texts = [text for pair in pairs for text in pair]
    trainer: Any
    if kind == "words":
        tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token=SPECIAL[UNKNOWN]))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False)
        least = len(SPECIAL) + 1
    elif kind == "bpe":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        least = len(SPECIAL) + len(alphabet)
    else:
        raise ValueError(f"data.tokens={kind!r}; choose bpe or words")
    if vocab_size < least:
        raise ValueError(f"data.vocab_size={vocab_size} is too small for tokens={kind}; pass {least} or more")
    tokenizer.train_from_iterator(texts, trainer)
    # Text that happens to spell a special token is text.
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary_file(pairs: Sequence[Pair], kind: str, vocab_size: int, cache: Path) -> Path:
    """Where the tokenizer of these pairs is kept: a key of their content, so it is never stale."""
    key = hashlib.sha256(json.dumps([FORMAT, tokenizers.__version__, kind, vocab_size]).encode())
    for pair in pairs:
        key.update(json.dumps(pair).encode())
    return cache / f"vocabulary-{key.hexdigest()[:24]}.json"


def build_vocabulary(pairs: Sequence[Pair], kind: Kind, vocab_size: int, cache: Path) -> None:
    """Trains the tokenizer and writes it, if that is not done; the file appears whole, by a rename."""
    file = vocabulary_file(pairs, kind, vocab_size, cache)
    if file.is_file():
        return
    tokenizer = train_vocabulary(pairs, kind, vocab_size)
    cache.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(prefix=file.name, dir=cache)
    os.close(handle)
    tokenizer.save(unfinished)
    Path(unfinished).chmod(0o644)
    os.replace(unfinished, file)


def read_vocabulary(file: Path) -> Vocabulary:
    """What was kept.

    Raises:
        FileNotFoundError: it is not there.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is not there: prepare_data read other pairs, or wrote to another machine; give every node the "
            "same pairs, and a cache of its own or a shared one"
        )
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.encode_special_tokens = True
    return Vocabulary(tokenizer)
