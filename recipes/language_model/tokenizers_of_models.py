"""Tokenizers that models come with: where they are, what ends a text, and what their tokens stand for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers

from lightning_dist.data.tokens.encode import load_tokenizer

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True)
class GivenTokenizer:
    """A tokenizer as text, so that it can be part of a key.

    Args:
        content: of a ``tokenizer.json``.
        end_of_text: the token that ends a text.
    """

    content: str
    end_of_text: str

    @classmethod
    def read(cls, directory: str | Path) -> GivenTokenizer:
        """That of a directory which ``save_pretrained`` of transformers wrote.

        Raises:
            FileNotFoundError: the directory has no ``tokenizer.json``.
            ValueError: it does not say what ends a text.
        """
        folder = Path(directory).expanduser()
        if not (folder / TOKENIZER).is_file():
            raise FileNotFoundError(
                f"{folder / TOKENIZER} is not there; pass a directory to which transformers saved a fast tokenizer"
            )
        config = json.loads((folder / CONFIG).read_text("utf-8")) if (folder / CONFIG).is_file() else {}
        end = config.get("eos_token")
        end = end.get("content") if isinstance(end, dict) else end
        if end is None:
            raise ValueError(
                f"{folder / CONFIG} names no eos_token; save the tokenizer with the token that ends a text"
            )
        return cls((folder / TOKENIZER).read_text("utf-8"), end)

    def load(self) -> tokenizers.Tokenizer:
        """It, without truncation and padding."""
        tokenizer = load_tokenizer(self.content)
        id_of(tokenizer, self.end_of_text)
        return tokenizer


def id_of(tokenizer: tokenizers.Tokenizer, name: str) -> int:
    """The number of a token, which has to be there."""
    token = tokenizer.token_to_id(name)
    if token is None:
        raise ValueError(f"the tokenizer has no token {name!r}, which should end a text")
    return token


def bytes_of_tokens(tokenizer: tokenizers.Tokenizer, end: str | None) -> np.ndarray:
    """UTF-8 bytes that each token stands for, ``(vocab_size,)`` int64; special tokens stand for none.

    A byte-level tokenizer spells a token with one character per byte; one of SentencePiece spells a space as U+2581,
    and a byte that it has no character for as ``<0x0A>``.
    """
    spelt = [tokenizer.id_to_token(token) for token in range(tokenizer.get_vocab_size())]
    is_byte_level = '"type":"ByteLevel"' in tokenizer.to_str()
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special} | {end}

    def num_bytes(token: str) -> int:
        if is_byte_level:
            return len(token)
        return 1 if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else len(token.replace("\u2581", " ").encode())

    return np.asarray([0 if token is None or token in special else num_bytes(token) for token in spelt], dtype=np.int64)
