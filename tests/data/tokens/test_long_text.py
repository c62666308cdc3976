"""A text file that is longer than a piece: read in parts of which few are held, and one document all the same."""

from __future__ import annotations

import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from lightning_dist.data import TokenStore, tokenize
from lightning_dist.data.tokens import sources
from lightning_dist.data.tokens.listing import list_sources
from tests.data.tokens.stores import END, train_tokenizer, write_store

PART = 100
LINES = "".join(f"line of number {number} été\n" * (number % 3) for number in range(60))
TEXTS = {
    "a.txt": "short",
    "b.txt": LINES,
    "c.txt.gz": LINES[:1500],
    "d.txt": "海x" * 300,
    "e.md": "\n".join(["short"] * 5),
    "f.txt": LINES[:1000],
    "g.txt": "z" * (2 * PART),
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> tokenizers.Tokenizer:
    return train_tokenizer(tmp_path / "tokenizer.json", [LINES[:200]])


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PART_BYTES", PART)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for name, text in TEXTS.items():
        data = text.encode()
        (tmp_path / "texts" / name).write_bytes(gzip.compress(data, 0) if name.endswith(".gz") else data)
    return tmp_path / "texts"


@pytest.mark.parametrize(("shard_tokens", "end"), [(50, None), (700, END), (2000, END), (1 << 20, END)])
def test_a_long_text_file_is_one_document_in_shards_as_any(
    tmp_path: Path, tokenizer: tokenizers.Tokenizer, folder: Path, shard_tokens: int, end: str | None
) -> None:
    """As many shards as documents need that are written whole."""
    options = {"shard_tokens": shard_tokens, "end_of_document": end}
    index = tokenize([folder], tmp_path / "store", tmp_path, workers=1, **options)
    store = TokenStore(tmp_path / "store")
    starts = [*store.document_starts(0, len(store)).tolist(), len(store)]
    documents = [store[a:b] for a, b in itertools.pairwise(starts)]
    decoded = [tokenizer.decode(tokens.tolist(), skip_special_tokens=False) for tokens in documents]
    assert decoded == [text + (end or "") for text in TEXTS.values()]
    whole = write_store(tmp_path / "whole", documents, shard_tokens=shard_tokens)
    assert whole.index.shards == index.shards


def test_parts_are_short_and_end_with_lines_or_characters(folder: Path) -> None:
    for name, text in TEXTS.items():
        parts = list(sources.pieces(list_sources([folder / name])))
        if len(text) <= PART:
            assert [part.kind for part in parts] == ["text"]
            continue
        read = [sources.text_of_part(part) for part in parts]
        assert "".join(read) == text
        assert all(len(one.encode()) <= PART for one in read)
        assert all("\n" not in one or one.endswith("\n") for one in read[:-1])
        assert [part.goes_on for part in parts] == [True] * (len(parts) - 1) + [False]
        assert sum(part.num_bytes for part in parts) == (folder / name).stat().st_size


def test_a_run_that_was_stopped_within_a_long_text_goes_on(
    tmp_path: Path, tokenizer: tokenizers.Tokenizer, folder: Path
) -> None:
    def contents(store: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in store.iterdir()}

    def stop(done: int, total: int) -> None:
        begun.append(done)
        if done > first + total / 4:
            raise InterruptedError

    arguments = {"sources": [folder], "tokenizer": tmp_path, "shard_tokens": 400, "workers": 1, "end_of_document": END}
    tokenize(**arguments, destination=tmp_path / "undisturbed")
    first, ends = 0, 0
    for _ in range(10):
        begun: list[int] = []
        try:
            tokenize(**arguments, destination=tmp_path / "store", progress=stop)
            break
        except InterruptedError:
            first, ends = begun[0], ends + 1
    assert ends > 2
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")


def test_a_byte_that_is_no_text_is_told_by_its_place_in_the_file(
    tmp_path: Path, tokenizer: tokenizers.Tokenizer
) -> None:
    data = LINES.encode() + b"\xff" + LINES.encode()
    for name, content in {"a.txt": data, "a.txt.gz": gzip.compress(data, 0)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"by its byte {len(LINES.encode()):,} \(of value 0xff\)"):
            tokenize([tmp_path / name], tmp_path / f"store of {name}", tmp_path, workers=1)


@pytest.mark.parametrize("end", [None, END])
def test_a_long_text_of_no_token_is_left_out(tmp_path: Path, end: str | None) -> None:
    """Of a tokenizer that knows one letter alone, which may come in any part."""
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, END: 1}, [])).save(str(tmp_path / "tokenizer.json"))
    for number, text in enumerate(["x" * 950, "x" * 450 + "a" + "x" * 500, "a" + "x" * 950, "x" * 950 + "a"]):
        (tmp_path / f"{number}.txt").write_text(text)
    index = tokenize([tmp_path], tmp_path / "store", tmp_path, workers=1, end_of_document=end)
    assert (index.num_documents, index.num_tokens) == (3, 3 if end is None else 6)


def test_a_store_that_was_begun_with_other_pieces_does_not_go_on(
    tmp_path: Path, tokenizer: tokenizers.Tokenizer, folder: Path
) -> None:
    index = tokenize([folder], tmp_path / "store", tmp_path, workers=1)
    (tmp_path / "store" / "index.json").unlink()
    settings = {name: value for name, value in index.settings.items() if name != "pieces"}
    (tmp_path / "store" / "unfinished.jsonl").write_text(json.dumps(settings) + "\n")
    with pytest.raises(ValueError, match="cuts sources otherwise, so it can't go on; remove the directory"):
        tokenize([folder], tmp_path / "store", tmp_path, workers=1)


MEASURE = """
import resource, sys
from lightning_dist.data import tokenize
tokenize([sys.argv[1]], sys.argv[2], sys.argv[3], workers=1)
print(max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) >> 10)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory in KiB")
def test_memory_does_not_grow_with_a_text_file(tmp_path: Path, tokenizer: tokenizers.Tokenizer) -> None:
    peaks = []
    for megabytes in (8, 40):
        (tmp_path / "a.txt").write_text(LINES * ((megabytes << 20) // len(LINES)))
        command = [sys.executable, "-c", MEASURE, tmp_path / "a.txt", tmp_path / f"of {megabytes}", tmp_path]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
    print(f"{peaks} MiB")
    assert peaks[1] < peaks[0] + 40
