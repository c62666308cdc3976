"""The files of a token store, and its index, which says all that is known without reading tokens.

A store is a directory:

- ``index.json``: written last, so a directory without it is not whole, see :class:`StoreIndex`;
- ``shard-00000.tokens``, ...: tokens one after the other, uint16 or uint32, little-endian, without a header;
- ``shard-00000.documents``, ...: int64, little-endian: where each document of the shard begins, in tokens, and the
  number of tokens; a document lies in one shard;
- ``tokenizer.json``: the tokenizer, as the library ``tokenizers`` has it.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_dist.checkpoint.locations import flush

INDEX, TOKENIZER = "index.json", "tokenizer.json"
TOKENS, DOCUMENTS = ".tokens", ".documents"
INCOMPLETE = ".incomplete"
"""How the name of a file ends that is being written."""

FORMAT, VERSION = "lightning_dist.tokens", 1
OFFSET = np.dtype("<i8")


class DamagedStore(ValueError):
    """A token store that lacks a part, or whose bytes are not those that were written."""


@dataclass(frozen=True)
class Shard:
    """One shard: its name, what it holds, and the CRC-32 of its files."""

    name: str
    num_tokens: int
    num_documents: int
    tokens_crc32: int
    documents_crc32: int


@dataclass(frozen=True)
class StoreIndex:
    """What a store says of itself.

    Args:
        dtype: of tokens, ``uint16`` or ``uint32``.
        vocab_size: one more than the largest token.
        settings: what decided the tokens: digests of tokenizer and sources, and options.
        shards: in the order of the sources.
        dropped: names of shards that were left out, since they were damaged.
    """

    dtype: str
    vocab_size: int
    settings: dict[str, Any]
    shards: tuple[Shard, ...]
    dropped: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Of all shards."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        """Of all shards."""
        return sum(shard.num_documents for shard in self.shards)

    @property
    def token_type(self) -> np.dtype:
        """As it lies on the disk."""
        return np.dtype(self.dtype).newbyteorder("<")

    def files(self, shard: Shard) -> dict[str, tuple[int, int]]:
        """Size in bytes and CRC-32 of each of a shard's files, by name."""
        return {
            shard.name + TOKENS: (shard.num_tokens * self.token_type.itemsize, shard.tokens_crc32),
            shard.name + DOCUMENTS: ((shard.num_documents + 1) * OFFSET.itemsize, shard.documents_crc32),
        }


def lost_part(folder: Path, files: dict[str, tuple[int, int]]) -> str | None:
    """What is wrong, in words, with the first of a shard's files that is missing or has another size than was written.

    Args:
        files: of :meth:`StoreIndex.files`.
    """
    for name, (size, _) in files.items():
        try:
            there = (folder / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if there != size:
            return f"{name} has {there} bytes, and {size} were written"
    return None


def shard_name(number: int) -> str:
    """Of the shard of this number, counted from 0."""
    return f"shard-{number:05d}"


def write_index(folder: Path, index: StoreIndex) -> None:
    """Puts it in place by a rename, once it is on the disk."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "num_tokens": index.num_tokens,
        "num_documents": index.num_documents,
        **asdict(index),
    }
    beside = folder / (INDEX + INCOMPLETE)
    with beside.open("w") as file:
        json.dump(content, file, indent=1)
        flush(file)
    os.replace(beside, folder / INDEX)
    flush_folder(folder)


def flush_folder(folder: Path) -> None:
    """Names that files were given survive a power failure, where the system lets a directory be flushed."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_index(folder: Path) -> StoreIndex:
    """The index of a store; nothing else is read.

    Raises:
        FileNotFoundError: there is none.
        DamagedStore: it can't be read.
        ValueError: it is of another format, or of a later version of it.
    """
    try:
        text = (folder / INDEX).read_bytes()
    except FileNotFoundError:
        hint = "tokenize it first" if not folder.exists() else "run the same `lightning-dist tokenize` again to its end"
        raise FileNotFoundError(f"{folder} has no {INDEX}, so it is no whole token store; {hint}") from None
    try:
        content = json.loads(text)
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise ValueError(
                f"{folder} is of format {content['format']} {content['version']}, and this version of lightning_dist "
                f"reads {FORMAT} {VERSION}; tokenize anew, or install the version that wrote it"
            )
        index = StoreIndex(
            dtype=content["dtype"],
            vocab_size=int(content["vocab_size"]),
            settings=dict(content["settings"]),
            shards=tuple(Shard(**shard) for shard in content["shards"]),
            dropped=tuple(content["dropped"]),
        )
        sums = content["num_tokens"], content["num_documents"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DamagedStore(f"token store {folder} is damaged: {INDEX} can't be read ({error!r})") from error
    if sums != (index.num_tokens, index.num_documents):
        raise DamagedStore(f"token store {folder} is damaged: the shards in {INDEX} do not have the tokens it names")
    return index
