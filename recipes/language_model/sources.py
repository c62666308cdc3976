"""Where text comes from: each function returns documents, in an order that does not change between runs."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SHUFFLE_SEED = 0
"""Seed of the order of documents; the run's own seed moves no document from training to validation."""


@dataclass(frozen=True)
class Document:
    """A text and the name it goes by, unique within its source."""

    name: str
    text: str

    @property
    def num_bytes(self) -> int:
        """Length in UTF-8."""
        return len(self.text.encode("utf-8"))


Source = Callable[[], list[Document]]
"""Reads the documents; called on every process, so it returns the same everywhere."""


def standard_library(max_bytes: int | None = None) -> list[Document]:
    """The Python files of this interpreter's standard library, without its tests and installed packages.

    Args:
        max_bytes: about how much text to take; a file that would pass it is left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = (path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    return _read(root, files, max_bytes)


def docstrings(max_bytes: int | None = None) -> list[Document]:
    """The docstrings of each of those files: plain English about code.

    Args:
        max_bytes: about how much text to take; a document that would pass it is left out.
    """
    documents: list[Document] = []
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    total = 0
    for document in standard_library():  # shuffled
        nodes = (node for node in ast.walk(ast.parse(document.text)) if isinstance(node, kinds))
        text = "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
        documents.append(Document(document.name, text))
        total += documents[-1].num_bytes
        if max_bytes is not None and total > max_bytes:
            break
    return _take(documents, max_bytes)


def text_files(
    paths: str | Path | Sequence[str | Path],
    pattern: str = "*.txt",
    max_bytes: int | None = None,
    chapter: str | None = None,
) -> list[Document]:
    """Files, and the files in directories.

    Args:
        paths: one or several files or directories.
        pattern: which files of a directory, at any depth.
        max_bytes: about how much text to take; a document that would pass it is left out.
        chapter: begin a document at each line that begins with this regular expression, rather than one a file; the
            documents of ``emma.txt`` are then named ``emma.txt 0``, ``emma.txt 1`` and so on.

    Raises:
        FileNotFoundError: a path is not there.
        ValueError: no file matches.
    """
    roots = [Path(path).expanduser() for path in ([paths] if isinstance(paths, str | Path) else paths)]
    documents: list[Document] = []
    for root in roots:
        if not root.exists():
            raise FileNotFoundError(
                f"text: {root} is not there; pass a text file, or a directory of files that match {pattern!r}, as "
                "data.source.paths=..."
            )
        files = [root] if root.is_file() else [path for path in root.rglob(pattern) if path.is_file()]
        documents += _read(root.parent, files, None)
    if chapter is not None:
        documents = [part for document in documents for part in _chapters(document, chapter)]
    if not documents:
        raise ValueError(f"text: no file in {', '.join(map(str, roots))} matches {pattern!r}; pass another pattern")
    return _take(documents, max_bytes)


def huggingface(
    name: str, config: str | None = None, split: str = "train", column: str = "text", max_bytes: int | None = None
) -> list[Document]:
    """The rows of a dataset from the Hugging Face hub, or from its local cache.

    Args:
        name: the dataset's name on the hub.
        config: the dataset's configuration, if it has several.
        split: which split; validation text is held out of it.
        column: the column that holds the text.
        max_bytes: stop reading after about this much text.

    Raises:
        ImportError: the package ``datasets`` is not installed.
        ConnectionError: the dataset is not cached and can't be downloaded.
        ValueError: it has no such column.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"reading {name!r} from the Hugging Face hub needs the package datasets; run `pip install datasets`, or "
            "take data=stdlib or data=text"
        ) from None
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ConnectionError(
            f"the dataset {name!r} is not in the local cache and could not be downloaded: {error}"
        ) from error
    if column not in rows.column_names:
        raise ValueError(f"the dataset {name!r} has no column {column!r}; it has {', '.join(rows.column_names)}")
    documents, total = [], 0
    for index, row in enumerate(rows):
        documents.append(Document(f"{index:09d}", row[column]))
        total += documents[-1].num_bytes
        if max_bytes is not None and total >= max_bytes:
            break
    return _take(documents, None)


def _read(root: Path, files: Iterable[Path], max_bytes: int | None) -> list[Document]:
    documents = [
        Document(path.relative_to(root).as_posix(), path.read_text("utf-8", errors="replace")) for path in sorted(files)
    ]
    return _take(documents, max_bytes)


def _chapters(document: Document, beginning: str) -> Iterable[Document]:
    pieces = re.split(rf"^(?={beginning})", document.text, flags=re.MULTILINE)
    return (Document(f"{document.name} {index}", piece) for index, piece in enumerate(pieces))


def _take(documents: list[Document], max_bytes: int | None) -> list[Document]:
    """Non-empty documents in a fixed random order, so that a capped or split text is a fair sample."""
    documents = [document for document in documents if document.text]
    random.Random(SHUFFLE_SEED).shuffle(documents)
    taken, total = [], 0
    for document in documents:
        if max_bytes is None or total + document.num_bytes <= max_bytes:
            taken.append(document)
            total += document.num_bytes
    if documents and not taken:
        raise ValueError(f"max_bytes={max_bytes} is less than the smallest document; pass more")
    return taken
