"""The pieces of files that are encoded at a time, and the documents in them."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_dist.data.tokens.listing import SourceFile, reading

PIECE_BYTES = 1 << 20
"""Of text, about, that is encoded at a time. Part of the store's format: a place is told in pieces."""

PART_BYTES = 1 << 22
"""Of a text file that are encoded at a time; a longer one is cut at ends of lines. Part of the store's format too."""

PIECES = 2
"""Version of how sources are cut, by which alone a store that was begun goes on."""

_BINARY = 8000
"""Bytes from the begin of a file in which text has no zero; the same number as git's."""

_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a character, which JSON may spell (``\\ud83d``) and no tokenizer takes."""


@dataclass(frozen=True)
class Piece:
    """Part of the sources, that is encoded at a time.

    Args:
        kind: of the files; ``part`` for part of a text file.
        paths: one, or several text files.
        start, stop: bytes in which the lines of a jsonl file begin, or of a part, or the row groups of a Parquet file.
        data: what was read already, since it can't be found again without reading what is before.
        num_bytes: of the files, for a progress bar.
        goes_on: whether the text file has another part.
    """

    kind: str
    paths: tuple[str, ...]
    start: int = 0
    stop: int = 0
    data: bytes | None = None
    num_bytes: int = 0
    goes_on: bool = False


def pieces(files: Sequence[SourceFile]) -> Iterator[Piece]:
    """The sources cut into pieces: by the files alone, so that they are the same every time."""
    group: list[SourceFile] = []
    for file in files:
        is_long = file.kind == "text" and file.size > PART_BYTES
        if group and (file.kind != "text" or is_long or sum(each.size for each in group) >= PIECE_BYTES):
            yield _texts(group)
            group = []
        if is_long:
            yield from _parts(file)
        elif file.kind == "text":
            group.append(file)
        elif file.kind == "jsonl":
            for start in range(0, file.size, PIECE_BYTES):
                stop = min(start + PIECE_BYTES, file.size)
                yield Piece("jsonl", (file.path,), start, stop, num_bytes=stop - start)
        elif file.kind == "jsonl.gz":
            yield from _inflated(file)
        else:
            groups = parquet_file(file.path).num_row_groups
            for row_group in range(groups):
                yield Piece("parquet", (file.path,), row_group, row_group + 1, num_bytes=file.size // groups)
    if group:
        yield _texts(group)


def _texts(files: Sequence[SourceFile]) -> Piece:
    return Piece("text", tuple(file.path for file in files), num_bytes=sum(file.size for file in files))


def _parts(file: SourceFile) -> Iterator[Piece]:
    """A long text file, of which no more than a part is held."""
    is_compressed, rest = _is_compressed(file.path), b""
    start = done = 0
    goes_on = True
    with reading(file.path), open(file.path, "rb") as raw, gzip.open(raw) if is_compressed else raw as text:
        while goes_on:
            data = rest + text.read(PART_BYTES - len(rest))
            goes_on = len(data) == PART_BYTES
            size = _end_of_lines(data) if goes_on else len(data)
            read = raw.tell() - done
            part = data[:size] if is_compressed else None
            yield Piece("part", (file.path,), start, start + size, part, read, goes_on)
            start, done, rest = start + size, done + read, data[size:]


def _end_of_lines(data: bytes) -> int:
    """Where the last whole line ends, or where there is none the last whole character."""
    if stop := data.rfind(b"\n") + 1:
        return stop
    stop = len(data) - 1
    while stop > len(data) - 4 and data[stop] & 0xC0 == 0x80:  # a byte within a character
        stop -= 1
    return stop


def _is_compressed(path: str) -> bool:
    return path.lower().endswith(".gz")


def _inflated(file: SourceFile) -> Iterator[Piece]:
    """Whole lines of a compressed file, which can only be read from its start."""
    done = 0
    with reading(file.path), open(file.path, "rb") as compressed, gzip.open(compressed) as lines:
        while data := lines.read(PIECE_BYTES):
            data += lines.readline()
            read = compressed.tell() - done
            done += read
            yield Piece("jsonl", (file.path,), data=data, num_bytes=read)


def documents(piece: Piece, field: str) -> Iterator[str]:
    """The texts of a piece, each a document: a text file, a line of a jsonl file, a row of a table.

    Args:
        field: of a line, or column of a table, that holds the text.

    Raises:
        ValueError: a line is no JSON object with a text of that name, a table has no such column, or a file is damaged.
    """
    if piece.kind == "text":
        for path in piece.paths:
            opened = gzip.open if _is_compressed(path) else open
            with reading(path), opened(path, "rb") as file:
                yield _decode(file.read(), path)
    elif piece.kind == "jsonl":
        for line in _lines(piece):
            if line.strip():
                yield _text_of_line(line, field, piece.paths[0])
    else:
        yield from _rows(piece, field)


def text_of_part(piece: Piece) -> str:
    """The text of a part of a file; a ValueError where it is none."""
    data = piece.data
    if data is None:
        with open(piece.paths[0], "rb") as file:
            file.seek(piece.start)
            data = file.read(piece.stop - piece.start)
    return _decode(data, piece.paths[0], piece.start)


def _decode(data: bytes, path: str, offset: int = 0) -> str:
    """Text of a file, from a byte on.

    Raises:
        ValueError: it is in another encoding than UTF-8, or no text.
    """
    try:
        text = data.decode("utf-8")
        if not offset and (place := data.find(0, 0, _BINARY)) >= 0:
            raise UnicodeDecodeError("utf-8", data, place, place + 1, "zero byte")
        return text
    except UnicodeDecodeError as error:
        unpacked = ", unpacked," if _is_compressed(path) else ""
        raise ValueError(
            f"{path}{unpacked} is no text in UTF-8, by its byte {offset + error.start:,} (of value "
            f"{data[error.start]:#04x}); leave it out if it is no text, unpack it if it is compressed, or convert it, "
            "as `iconv -f LATIN1 -t UTF-8` does from Latin-1"
        ) from error


def _lines(piece: Piece) -> Iterator[bytes]:
    """Those that begin in the piece."""
    if piece.data is not None:
        yield from io.BytesIO(piece.data)
        return
    with open(piece.paths[0], "rb") as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()
        place = file.tell()
        while place < piece.stop and (line := file.readline()):
            place += len(line)
            yield line


def _text_of_line(line: bytes, field: str, path: str) -> str:
    try:
        text = json.loads(line)[field]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        begin = line[:60].decode("utf-8", errors="replace").rstrip()
        raise ValueError(
            f"{path} has a line that is no JSON object with a text {field!r}, which begins {begin!r}; name the "
            "field by --field, or mend the line"
        )
    return _SURROGATE.sub("\ufffd", text)


def _rows(piece: Piece, field: str) -> Iterator[str]:
    table = parquet_file(piece.paths[0])
    names = table.schema_arrow.names
    if field not in names:
        raise ValueError(f"{piece.paths[0]} has no column {field!r}; name one of {', '.join(names)} by --field")
    with reading(piece.paths[0]):
        for batch in table.iter_batches(1024, row_groups=range(piece.start, piece.stop), columns=[field]):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    raise ValueError(f"column {field!r} of {piece.paths[0]} is no text; name another by --field")
                yield text or ""


def parquet_file(path: str) -> Any:
    """Of pyarrow; a ValueError where that is not installed, or this is none."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(
            f"{path} is a Parquet file, and pyarrow is not installed; run `pip install 'lightning-dist[parquet]'`"
        ) from None
    with reading(path):
        return ParquetFile(path)
