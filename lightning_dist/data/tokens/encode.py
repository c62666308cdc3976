"""Encoding of text in worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from lightning_dist.data.tokens.sources import Piece, documents, text_of_part

_BATCH = 1 << 20
"""Characters that are encoded at a time: an encoding takes some hundred times the memory of its tokens."""

PART = 1 << 22
"""Characters of a document that are encoded at a time; a longer one is cut at ends of lines."""


@dataclass(frozen=True)
class Encoder:
    """How text becomes tokens.

    Args:
        tokenizer: the JSON of a tokenizer of the library ``tokenizers``.
        dtype: of the tokens.
        field: see :func:`~lightning_dist.data.tokens.sources.documents`.
        end: token after each document.
    """

    tokenizer: str
    dtype: str
    field: str
    end: int | None


@dataclass(frozen=True)
class Encoded:
    """The tokens of a piece, ``(n,)``, and how many of them each of its documents has, ``(documents,)``.

    A document without a token is left out.
    """

    tokens: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class EncodedPart:
    """The tokens of part of a document, ``(n,)``, that comes in several pieces.

    Args:
        end: what comes after the document's last token, if it has any; None where the document goes on.
    """

    tokens: np.ndarray
    end: np.ndarray | None


def load_tokenizer(content: str) -> Any:
    """A ``tokenizers.Tokenizer`` that encodes whole texts as text: without truncation or padding, and what spells a
    special token is no special token.

    Raises:
        ValueError: the library is not installed, or this is no tokenizer of its.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError(
            "tokenizing takes the library tokenizers, which is not there; run `pip install 'lightning-dist[tokens]'`"
        ) from None
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # what the library raises has no type of its own
        raise ValueError(f"the tokenizer can't be read by the library tokenizers: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


class Worker:
    """Encodes pieces; one in each process.

    Args:
        encoder: what it does.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self._tokenizer = encoder, load_tokenizer(encoder.tokenizer)

    def encode(self, piece: Piece) -> Encoded | EncodedPart:
        """The tokens of a piece's documents, in their order."""
        if piece.kind == "part":
            return self._part(piece)
        parts: list[np.ndarray] = []
        lengths: list[int] = []
        texts: list[str] = []
        waiting = 0
        for text in documents(piece, self._encoder.field):
            if len(text) > PART:
                self._add(texts, parts, lengths)
                self._add_long(text, parts, lengths)
                texts, waiting = [], 0
                continue
            texts.append(text)
            waiting += len(text)
            if waiting >= _BATCH:
                self._add(texts, parts, lengths)
                texts, waiting = [], 0
        self._add(texts, parts, lengths)
        return Encoded(np.concatenate([*parts, np.empty(0, self._encoder.dtype)]), np.asarray(lengths, np.int64))

    def _part(self, piece: Piece) -> EncodedPart:
        dtype, end = self._encoder.dtype, [] if self._encoder.end is None else [self._encoder.end]
        ids = self._tokenizer.encode_batch_fast([text_of_part(piece)], add_special_tokens=False)[0].ids
        return EncodedPart(np.array(ids, dtype), None if piece.goes_on else np.array(end, dtype))

    def _add(self, texts: list[str], parts: list[np.ndarray], lengths: list[int]) -> None:
        end = [] if self._encoder.end is None else [self._encoder.end]
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            if ids := encoding.ids:
                parts.append(np.array(ids + end, self._encoder.dtype))
                lengths.append(len(parts[-1]))

    def _add_long(self, text: str, parts: list[np.ndarray], lengths: list[int]) -> None:
        encoded = [
            np.array(self._tokenizer.encode(part, add_special_tokens=False).ids, self._encoder.dtype)
            for part in cut(text)
        ]
        if not any(map(len, encoded)):
            return
        end = [] if self._encoder.end is None else [self._encoder.end]
        parts += [*encoded, np.array(end, self._encoder.dtype)]
        lengths.append(sum(map(len, encoded)) + len(end))


def cut(text: str) -> Iterator[str]:
    """A long text in parts of at most :data:`PART` characters, cut after ends of lines where there are any."""
    start = 0
    while start < len(text):
        stop = min(start + PART, len(text))
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


_worker: Worker | None = None
"""Of this process, if it is a worker."""


def _start(encoder: Encoder) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits for this one ends it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Worker(encoder)


def _end_with_parent() -> None:
    """A worker whose parent is killed would wait for the next piece for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _encode(piece: Piece) -> Encoded | EncodedPart:
    assert _worker is not None, "this process is no worker"
    try:
        return _worker.encode(piece)
    except Exception as error:
        if type(error) is not Exception:  # what the library raises has no type of its own
            raise
        raise ValueError(f"the tokenizer can't encode text of {piece.paths[0]}: {error}") from error


@contextmanager
def _processes(encoder: Encoder, workers: int) -> Iterator[ProcessPoolExecutor]:
    # importing torch again would take each some seconds
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(encoder,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def encoded(parts: Iterable[Piece], encoder: Encoder, workers: int) -> Iterator[tuple[Piece, Encoded | EncodedPart]]:
    """The tokens of pieces in their order, encoded in so many processes, a few pieces ahead.

    Raises:
        ValueError: a piece can't be read, or a process was killed.
    """
    with _processes(encoder, workers) as pool:
        waiting: deque[tuple[Piece, Future[Encoded | EncodedPart]]] = deque()
        try:
            for piece in parts:
                waiting.append((piece, pool.submit(_encode, piece)))
                if len(waiting) > 3 * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool as error:
            raise ValueError(
                "a process that encodes was killed, most likely for want of memory; run the same command again with "
                "fewer --workers, it goes on where it was; where one is too many, a line or row of the sources is a "
                "document that is too long to be held, so divide it or write it as a text file"
            ) from error
