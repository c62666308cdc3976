"""Which files text comes from, in an order that does not change, and what each is."""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_dist.data.folders import files_below

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".ndjson.gz": "jsonl.gz",
    ".json.gz": "jsonl.gz",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".txt.gz": "text",
}
"""By the end of a file's name; what else is named itself, or matches a pattern, is text."""

_DOCUMENTS = (".json", ".json.gz")
"""Ends of names that JSON lines may have, and single documents too."""

_UNREADABLE = (
    *(".zst", ".bz2", ".xz", ".lzma", ".lz4", ".br", ".zip", ".7z", ".rar"),
    *(".tar", ".tar.gz", ".tgz"),
)
"""How the names of archives end, and of files compressed otherwise than by gzip."""

_BEGIN = 1 << 20
"""Bytes in which a first line is looked for."""


@dataclass(frozen=True)
class SourceFile:
    """A file to read: its path, what it is, and what tells whether it is still the same."""

    path: str
    name: str
    kind: str
    size: int
    modified: int


def list_sources(
    sources: Sequence[str | os.PathLike[str]],
    pattern: str | None = None,
    apart_from: Path | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> list[SourceFile]:
    """The files of sources, in the order that they are given; those of a folder, at any depth, in that of their names,
    links followed, each once.

    Args:
        pattern: of names of files in folders, such as ``*.py``; by default those whose kind is known by their end.
        apart_from: a folder whose files are none of the sources.
        report: called with a sentence for each folder that has files which are not read.

    Raises:
        FileNotFoundError: a source is not there.
        PermissionError: a folder can't be listed.
        ValueError: there is no file to read, one that comes twice, or one that is named and can't be read.
    """
    there = None if apart_from is None else apart_from.resolve()
    files: list[SourceFile] = []
    behind: list[str] = []
    for number, source in enumerate(sources):
        root = Path(source).expanduser()
        if not root.exists():
            raise FileNotFoundError(f"{root} is not there; pass files of text, .jsonl or .parquet, or folders of them")
        found = {path: os.path.realpath(path) for path in ([root] if root.is_file() else files_below(root))}
        if there is not None:
            found = {path: real for path, real in found.items() if not Path(real).is_relative_to(there)}
        for path, real in (found if root.is_file() else _wanted(root, found, pattern, report)).items():
            if root.is_file() or pattern:
                _refuse_unreadable(path)
            name = path.relative_to(root).as_posix() if root.is_dir() else path.name
            status, kind = path.stat(), _kind(path) or "text"
            files.append(SourceFile(str(path), f"{number}/{name}", kind, status.st_size, status.st_mtime_ns))
            behind.append(real)
    if not files:
        ends = pattern or ", ".join(KINDS)
        raise ValueError(f"no file to tokenize in {', '.join(map(str, sources))}: none matches {ends}; see --pattern")
    _refuse_repeated([file.path for file in files], behind)
    return files


def fingerprint(files: Sequence[SourceFile]) -> dict[str, Any]:
    """What tells whether sources are the same ones: names below what was given, sizes, times of the last change."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps([file.name, file.kind, file.size, file.modified]).encode())
    return {"files": len(files), "bytes": sum(file.size for file in files), "sha256": digest.hexdigest()}


def _wanted(root: Path, found: dict[Path, str], pattern: str | None, report: Callable[[str], None]) -> dict[Path, str]:
    """The files of a folder that are read, and what is behind each, where links are no files of their own. Those that
    no pattern leaves out are told of.
    """
    wanted: dict[str, Path] = {}
    for path, real in found.items():
        if fnmatch.fnmatch(path.name, pattern) if pattern else _kind(path) and not _is_one_document(path):
            wanted.setdefault(real, path)
    others = Counter(
        _end(path) + " of one document" * bool(_kind(path)) for path, real in found.items() if real not in wanted
    )
    if others and not pattern:
        ends = ", ".join(f"{count:,} {end}" for end, count in others.most_common(8)) + ", ..." * (len(others) > 8)
        report(
            f"{root} has files that are not read, {others.total():,} by the ends of their names: {ends}; name those "
            "that are text, or see --pattern"
        )
    return {path: real for real, path in wanted.items()}


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for end, kind in KINDS.items() if name.endswith(end)), None)


def _end(path: Path) -> str:
    """How the name of a file ends, for users."""
    ends = [end.lower() for end in path.suffixes]
    of_two = len(ends) > 1 and (ends[-1] == ".gz" or ends[-1] in _UNREADABLE)
    return "".join(ends[-2:] if of_two else ends[-1:]) or "without an end"


def _is_one_document(path: Path) -> bool:
    """Whether a file that may be JSON lines or a JSON document is the latter, by its first line, which is no object."""
    if not path.name.lower().endswith(_DOCUMENTS):
        return False
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    with reading(str(path)), opened(path, "rb") as file:
        begin = file.read(_BEGIN)
    text = begin.removeprefix(b"\xef\xbb\xbf").lstrip()
    line, is_line, _ = text.partition(b"\n")
    if not text or (not is_line and len(begin) == _BEGIN):
        return bool(text) and not text.startswith(b"{")
    try:
        return not isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return True


def _refuse_unreadable(path: Path) -> None:
    """Raises a ValueError for a file that is named and whose name tells that it is no text, or one JSON document."""
    if path.name.lower().endswith(_UNREADABLE):
        raise ValueError(
            f"{path} is an archive, or compressed otherwise than by gzip, which is not read; unpack it and name the "
            "text in it"
        )
    if _is_one_document(path):
        raise ValueError(
            f"{path} is not JSON lines, since its first line is no JSON object; write each document as an object on a "
            "line of its own (`jq -c '.[]'` does for an array), or leave it out"
        )


def _refuse_repeated(paths: Sequence[str], behind: Sequence[str]) -> None:
    """Raises a ValueError for a file that comes twice, by what is behind links."""
    seen: dict[str, str] = {}
    for path, real in zip(paths, behind, strict=True):
        if real in seen:
            is_same = os.path.abspath(seen[real]) == os.path.abspath(path)
            what = f"{path} is named twice" if is_same else f"{path} is {seen[real]} once more, behind a link"
            raise ValueError(
                f"{what}, so its documents would be read twice; name it once, or write a store of its own and mix "
                "stores by weights="
            )
        seen[real] = path


@contextmanager
def reading(path: str) -> Iterator[None]:
    """What the libraries that read a file raise where it is damaged, in a sentence."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); get it again, or leave it out") from error
    except Exception as error:
        if not type(error).__module__.startswith("pyarrow"):
            raise
        raise ValueError(f"{path} is no Parquet file, or a damaged one ({error}); get it again") from error
