"""Where text comes from: files, in an order that does not change, and the pieces of them that are encoded at a time."""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_dist.data.folders import files_below, first_repeated

PIECE_BYTES = 1 << 20
"""Of text, about, that is encoded at a time. Part of the store's format: a place is told in pieces."""

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".ndjson.gz": "jsonl.gz",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".txt.gz": "text",
}
"""By the end of a file's name; what else is named itself, or matches a pattern, is text."""

_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a character, which JSON may spell (``\\ud83d``) and no tokenizer takes."""


@dataclass(frozen=True)
class SourceFile:
    """A file to read: its path, what it is, and what tells whether it is still the same."""

    path: str
    name: str
    kind: str
    size: int
    modified: int


@dataclass(frozen=True)
class Piece:
    """Part of the sources, that is encoded at a time.

    Args:
        kind: of the files.
        paths: one, or several text files.
        start, stop: bytes in which the lines of a jsonl file begin, or the row groups of a Parquet file.
        data: lines that were read already, since they can't be found again without reading what is before.
        num_bytes: of the files, for a progress bar.
    """

    kind: str
    paths: tuple[str, ...]
    start: int = 0
    stop: int = 0
    data: bytes | None = None
    num_bytes: int = 0


def list_sources(sources: Sequence[str | os.PathLike[str]], pattern: str | None = None) -> list[SourceFile]:
    """The files of sources, in the order that they are given; those of a folder, at any depth, in that of their names,
    links followed.

    Args:
        pattern: of names of files in folders, such as ``*.py``; by default those whose kind is known by their end.

    Raises:
        FileNotFoundError: a source is not there.
        PermissionError: a folder can't be listed.
        ValueError: there is no file to read, or one that comes twice.
    """
    files: list[SourceFile] = []
    for number, source in enumerate(sources):
        root = Path(source).expanduser()
        if not root.exists():
            raise FileNotFoundError(f"{root} is not there; pass files of text, .jsonl or .parquet, or folders of them")
        inside = [root] if root.is_file() else files_below(root)
        for path in inside:
            if root.is_dir() and not (fnmatch.fnmatch(path.name, pattern) if pattern else _kind(path)):
                continue
            name = path.relative_to(root).as_posix() if root.is_dir() else path.name
            found = path.stat()
            kind = _kind(path) or "text"
            files.append(SourceFile(str(path), f"{number}/{name}", kind, found.st_size, found.st_mtime_ns))
    if not files:
        ends = pattern or ", ".join(KINDS)
        raise ValueError(f"no file to tokenize in {', '.join(map(str, sources))}: none matches {ends}; see --pattern")
    if twice := first_repeated(os.path.abspath(file.path) for file in files):
        raise ValueError(
            f"{twice} is named twice, so its documents would be read twice; name it once, or write a store of its own "
            "and mix stores by weights="
        )
    return files


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for end, kind in KINDS.items() if name.endswith(end)), None)


def fingerprint(files: Sequence[SourceFile]) -> dict[str, Any]:
    """What tells whether sources are the same ones: names below what was given, sizes, times of the last change."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps([file.name, file.kind, file.size, file.modified]).encode())
    return {"files": len(files), "bytes": sum(file.size for file in files), "sha256": digest.hexdigest()}


def pieces(files: Sequence[SourceFile]) -> Iterator[Piece]:
    """The sources cut into pieces: by the files alone, so that they are the same every time."""
    group: list[SourceFile] = []
    for file in files:
        if group and (file.kind != "text" or sum(each.size for each in group) >= PIECE_BYTES):
            yield _texts(group)
            group = []
        if file.kind == "text":
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


def _inflated(file: SourceFile) -> Iterator[Piece]:
    """Whole lines of a compressed file, which can only be read from its start."""
    done = 0
    with _reading(file.path), open(file.path, "rb") as compressed, gzip.open(compressed) as lines:
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
            opened = gzip.open if path.lower().endswith(".gz") else open
            with _reading(path), opened(path, "rb") as file:
                yield file.read().decode("utf-8", errors="replace")
    elif piece.kind == "jsonl":
        for line in _lines(piece):
            if line.strip():
                yield _text_of_line(line, field, piece.paths[0])
    else:
        yield from _rows(piece, field)


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
    with _reading(piece.paths[0]):
        for batch in table.iter_batches(1024, row_groups=range(piece.start, piece.stop), columns=[field]):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    raise ValueError(f"column {field!r} of {piece.paths[0]} is no text; name another by --field")
                yield text or ""


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """What the libraries that read a file raise where it is damaged, in a sentence."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); get it again, or leave it out") from error
    except Exception as error:
        if not type(error).__module__.startswith("pyarrow"):
            raise
        raise ValueError(f"{path} is no Parquet file, or a damaged one ({error}); get it again") from error


def parquet_file(path: str) -> Any:
    """Of pyarrow; a ValueError where that is not installed, or this is none."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(
            f"{path} is a Parquet file, and pyarrow is not installed; run `pip install 'lightning-dist[parquet]'`"
        ) from None
    with _reading(path):
        return ParquetFile(path)
