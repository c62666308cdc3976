"""Text to a token store: in several processes, to the same bytes with any number of them and from any interruption."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_dist.checkpoint.locations import flush
from lightning_dist.data.tokens.encode import EncodedPart, Encoder, encoded, load_tokenizer
from lightning_dist.data.tokens.format import (
    INDEX,
    TOKENIZER,
    DamagedStore,
    StoreIndex,
    lost_part,
    read_index,
    write_index,
)
from lightning_dist.data.tokens.listing import fingerprint, list_sources
from lightning_dist.data.tokens.sources import PIECES, pieces
from lightning_dist.data.tokens.writer import JOURNAL, Journal, ShardsWriter, locked

_NAMES = {
    "tokenizer": "the tokenizer",
    "tokenizers": "the version of the library tokenizers",
    "sources": "the sources (their names, sizes or times of change)",
    "shard_tokens": "--shard-tokens",
    "field": "--field",
    "end_of_document": "--end-of-document",
}
"""What decides the tokens of a store, and how users know it."""


def tokenize(
    sources: Sequence[str | os.PathLike[str]],
    destination: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    *,
    workers: int | None = None,
    shard_tokens: int = 1 << 26,
    field: str = "text",
    pattern: str | None = None,
    end_of_document: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    report: Callable[[str], None] = rank_zero_warn,
) -> StoreIndex:
    """Writes a token store; one that was begun goes on, one that is whole stays.

    Args:
        sources: files or folders, see :func:`~lightning_dist.data.tokens.listing.list_sources`.
        destination: the store's directory.
        tokenizer: a file of the library ``tokenizers``, or a directory with a ``tokenizer.json``.
        workers: processes that encode; by default one for each core that this process may use.
        shard_tokens: of a shard at most; one that is being written when the process is killed is written anew.
        field: of JSON lines, or column of Parquet files, with the text.
        pattern: of names of files in folders.
        end_of_document: token after each document.
        progress: called with the bytes of the sources that are done, and all.
        report: called with a sentence for files of a folder that are not read, and for what a store lacks.

    Returns:
        The store's index.

    Raises:
        FileNotFoundError: a source or the tokenizer is not there.
        DamagedStore: the store was whole, and lost shards since.
        ValueError: the directory holds something else, or a store of another tokenizer, other sources or options; a
            source that can't be read; an option that can't be.
    """
    folder, content = Path(destination).expanduser(), _read_tokenizer(tokenizer)
    _validate_destination(folder)
    files = list_sources(sources, pattern, folder, report)  # a store within a source is none of it
    encoder, vocab_size, version = _encoder(content, field, end_of_document)
    if shard_tokens < 1 or (workers is not None and workers < 1):
        raise ValueError(f"--shard-tokens {shard_tokens} and --workers {workers} must be at least 1")
    settings: dict[str, Any] = {
        "tokenizer": hashlib.sha256(content.encode()).hexdigest(),
        "tokenizers": version,
        "sources": fingerprint(files),
        "shard_tokens": shard_tokens,
        "field": field,
        "end_of_document": end_of_document,
        "pieces": PIECES,
    }
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX).exists():  # nothing is written, so several may ask, also who may not write there
        return _whole(folder, settings, report)
    with locked(folder) as file:
        if (folder / INDEX).exists():
            return _whole(folder, settings, report)
        journal = Journal(file, settings)
        _validate_same(folder, journal.settings, settings)
        if journal.settings.get("pieces") != PIECES:  # in which places are told, and nothing else
            raise ValueError(
                f"{folder} was begun by a version of lightning_dist that cuts sources otherwise, so it can't go on; "
                "remove the directory to begin anew"
            )
        index = StoreIndex(encoder.dtype, vocab_size, settings, ())
        journal.end_at_first_lost(folder, index)
        journal.remove_others(folder)
        _write_tokenizer(folder, content)
        writer = ShardsWriter(folder, journal, index.token_type, shard_tokens)
        _write(files, encoder, workers or _cores(), journal, writer, progress)
        if not journal.shards:
            raise ValueError(f"there is no text in {', '.join(map(str, sources))}")
        index = StoreIndex(encoder.dtype, vocab_size, settings, tuple(journal.shards))
        write_index(folder, index)
        _remove_journal(folder)
    return index


def _whole(folder: Path, settings: dict[str, Any], report: Callable[[str], None]) -> StoreIndex:
    """The index of a store that is there; a DamagedStore where shards were lost since. What was dropped is told."""
    _remove_journal(folder)
    index = read_index(folder)
    _validate_same(folder, index.settings, settings)
    if what := next(filter(None, (lost_part(folder, index.files(shard)) for shard in index.shards)), None):
        raise DamagedStore(
            f"token store {folder} is damaged: {what}; remove the directory and tokenize anew, or leave out what is "
            f"damaged by `lightning-dist data check {folder} --drop`"
        )
    if index.dropped:
        report(
            f"{folder} is without {len(index.dropped):,} of its shards, which were damaged and dropped; remove the "
            "directory and tokenize anew to have them again"
        )
    return index


def _write_tokenizer(folder: Path, content: str) -> None:
    with (folder / TOKENIZER).open("w", encoding="utf-8") as file:
        file.write(content)
        flush(file)


def _remove_journal(folder: Path) -> None:
    """Of a whole store, whose writer was killed before it did, or is about to."""
    with suppress(OSError):
        (folder / JOURNAL).unlink()


def _write(files: Any, encoder: Encoder, workers: int, journal: Journal, writer: ShardsWriter, progress: Any) -> None:
    place, total, done = journal.place, sum(file.size for file in files), 0
    every = pieces(files)
    for piece in itertools.islice(every, place.pieces):
        done += piece.num_bytes
    count = place.pieces
    try:
        for piece, part in encoded(every, encoder, workers):
            if isinstance(part, EncodedPart):
                writer.add_part(part, count)
            else:
                writer.add(part, count, place.documents if count == place.pieces else 0)
            count, done = count + 1, done + piece.num_bytes
            progress(done, total)
        writer.finish(count)
    finally:
        writer.close()
    progress(total, total)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_tokenizer(path: str | os.PathLike[str]) -> str:
    given = Path(path).expanduser()
    file = given / TOKENIZER if given.is_dir() else given
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is not there; pass a tokenizer.json of the library tokenizers, or a directory that has one"
        )
    return file.read_text(encoding="utf-8")


def _encoder(content: str, field: str, end_of_document: str | None) -> tuple[Encoder, int, str]:
    """The encoder, the size of the vocabulary, and the library's version."""
    tokenizer = load_tokenizer(content)
    import tokenizers

    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    end = None if end_of_document is None else tokenizer.token_to_id(end_of_document)
    if end_of_document is not None and end is None:
        raise ValueError(f"the tokenizer has no token {end_of_document!r}; name one that it has by --end-of-document")
    dtype = np.uint16 if size <= 1 << 16 else np.uint32
    return Encoder(content, np.dtype(dtype).name, field, end), size, tokenizers.__version__


def _validate_destination(folder: Path) -> None:
    known = (folder / INDEX).exists() or (folder / JOURNAL).exists()
    if not known and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and no token store; name a new directory, or an empty one")


def _validate_same(folder: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    others = [_NAMES[name] for name in _NAMES if there.get(name) != asked[name]]
    if others:
        raise ValueError(
            f"{folder} holds tokens made otherwise: {' and '.join(others)} differ from what is asked now; pass the "
            "same, name another directory, or remove this one to begin anew"
        )
