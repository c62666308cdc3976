"""Pairs of texts from files, and the parts in which they are trained, validated and tested on."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

PARTS = ("train", "val", "test")


class Pair(NamedTuple):
    """What is given, and what it is to become."""

    source: str
    target: str


PairParts = Mapping[str, Sequence[Pair]]
"""The pairs of ``train``, ``val`` and ``test``."""


def pair_parts(
    path: str | Path | None,
    otherwise: Callable[[], PairParts] | None = None,
    *,
    val_path: str | Path | None = None,
    test_path: str | Path | None = None,
    fields: Sequence[str] = ("source", "target"),
    val_fraction: float = 0.05,
    test_fraction: float = 0.05,
) -> PairParts:
    """The pairs of a file in three parts, the same on every process.

    What has no file of its own is a share of ``path``, chosen by a hash of the source: pairs of one source lie in one
    part, in whatever order the file has them.

    Args:
        path: a file that :func:`read_pairs` reads.
        otherwise: gives the parts where there is no path.
        val_path: a file to validate on, in place of a share.
        test_path: a file to test on, in place of a share.
        fields: names of the two columns.
        val_fraction: about the share of the pairs that validation gets.
        test_fraction: the same for testing.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is none of pairs, or a part would have none.
    """
    if path is None:
        if otherwise is None:
            raise ValueError("there are no pairs; pass a .tsv or .jsonl file as data.path=...")
        return otherwise()
    parts: dict[str, list[Pair]] = {part: [] for part in PARTS}
    shares = {}
    for part, file, fraction in (("val", val_path, val_fraction), ("test", test_path, test_fraction)):
        if file is not None:
            parts[part] = read_pairs(file, fields)
        elif not 0 < fraction < 1:
            raise ValueError(f"data.{part}_fraction={fraction} must lie between 0 and 1; or pass data.{part}_path=...")
        else:
            shares[part] = fraction
    for pair in read_pairs(path, fields):
        parts[_part_of(pair.source, shares)].append(pair)
    if empty := [part for part in PARTS if not parts[part]]:
        raise ValueError(
            f"the pairs of {path} leave none for {' and '.join(empty)}; pass more of them, or files of their own as "
            "data.val_path=... and data.test_path=..."
        )
    return parts


def _part_of(source: str, shares: Mapping[str, float]) -> str:
    place = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "little") / 2**64
    for part, share in shares.items():
        if place < share:
            return part
        place -= share
    return "train"


def read_pairs(path: str | Path, fields: Sequence[str] = ("source", "target")) -> list[Pair]:
    """The pairs of a file, in its order.

    Args:
        path: ``.tsv`` with a pair a line, whose first line may name columns; or ``.jsonl`` with an object a line.
        fields: names of the two columns. Without a line of names a .tsv file has just these two.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: another kind of file, or a line that is no pair.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; pass a .tsv or .jsonl file of pairs")
    readers = {".jsonl": _of_json, ".tsv": _of_columns}
    if file.suffix not in readers:
        raise ValueError(f"{file} is no .tsv or .jsonl file; pairs are read from these two")
    source, target = fields
    return list(readers[file.suffix](file, source, target))


def _of_json(file: Path, source: str, target: str) -> Iterator[Pair]:
    # Not splitlines(): texts may have other characters that end a line, such as U+2028.
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            pair: Pair | None
            try:
                found = json.loads(line)
                pair = Pair(found[source], found[target])
            except (ValueError, KeyError, TypeError):
                pair = None
            if pair is None or not all(isinstance(text, str) for text in pair):
                raise ValueError(
                    f"line {number} of {file} is no JSON object with texts {source!r} and {target!r}; name others as "
                    "data.fields=[...]"
                )
            yield pair


def _of_columns(file: Path, source: str, target: str) -> Iterator[Pair]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        columns: Sequence[int] | None = None
        for row in rows:
            if columns is None:
                names = source in row and target in row
                columns = (row.index(source), row.index(target)) if names else (0, 1)
                width = len(row)
                if names:
                    continue
                if width != 2:
                    raise ValueError(
                        f"{file} has {width} columns, and no line of names with {source!r} and {target!r}; name two "
                        "of its columns as data.fields=[...], or leave two"
                    )
            if not row:
                continue
            if len(row) != width:
                raise ValueError(f"line {rows.line_num} of {file} has {len(row)} columns, and the first {width}")
            yield Pair(row[columns[0]], row[columns[1]])


def padded(rows: Sequence[Sequence[int]], length: int, value: int) -> Tensor:
    """Rows of tokens, ``(rows, length)`` int64, with a value after those that are shorter."""
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
