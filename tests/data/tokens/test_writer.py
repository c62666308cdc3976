"""Shards on the disk, and the journal: what is told to be there is there, and nothing else is kept."""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_dist.cli import main
from lightning_dist.data import tokenize
from lightning_dist.data.tokens import DamagedStore, sources
from lightning_dist.data.tokens.encode import Encoded
from lightning_dist.data.tokens.writer import Journal, ShardsWriter, locked
from tests.data.tokens.stores import train_tokenizer


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of ``tokenize``, for a store of many shards."""
    monkeypatch.setattr(sources, "PIECE_BYTES", 200)
    texts = [f"some text and number {number}" for number in range(36)]
    train_tokenizer(tmp_path / "tokenizer.json", texts)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"tokenizer": tmp_path, "shard_tokens": 25, "workers": 1}
    return {"sources": [tmp_path / "a.jsonl"], "destination": tmp_path / "store", **options}


def contents(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


def stopped(asked: dict[str, Any]) -> Path:
    """The journal of a store that was begun, and stopped after many shards."""

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        tokenize(**asked, progress=stop)
    journal = asked["destination"] / "unfinished.jsonl"
    assert len(journal.read_bytes().splitlines()) > 4
    return journal


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(("lose", "end"), [(Path.unlink, ".tokens"), (cut, ".documents")], ids=["missing", "cut"])
def test_a_shard_that_was_lost_is_written_again(asked: dict[str, Any], lose: Callable[[Path], None], end: str) -> None:
    """And those after it; the ones before it stay."""
    tokenize(**asked | {"destination": asked["destination"].with_name("undisturbed")})
    stopped(asked)
    store = asked["destination"]
    first = (store / "shard-00000.tokens").stat().st_mtime_ns
    lose(store / f"shard-00002{end}")
    tokenize(**asked)
    assert contents(store) == contents(store.with_name("undisturbed"))
    assert (store / "shard-00000.tokens").stat().st_mtime_ns == first


def test_a_journal_is_read_as_far_as_it_can_be(asked: dict[str, Any]) -> None:
    tokenize(**asked | {"destination": asked["destination"].with_name("undisturbed")})
    journal = stopped(asked)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]) + b"\0" * 40 + b"\n" + b"".join(lines[4:]))
    begun: list[int] = []
    tokenize(**asked, progress=lambda done, total: begun.append(done))
    assert contents(asked["destination"]) == contents(asked["destination"].with_name("undisturbed"))
    assert begun[0] > 200


@pytest.mark.parametrize("first", [b"\0" * 50, b"\xff\xfe", b"[]"], ids=["zeros", "bytes", "list"])
def test_a_journal_that_can_not_be_read_is_one_sentence(asked: dict[str, Any], first: bytes) -> None:
    journal = stopped(asked)
    journal.write_bytes(first + b"\n")
    before = contents(asked["destination"])
    with pytest.raises(ValueError, match=r"unfinished\.jsonl can't be read, so .* remove the directory to begin anew"):
        tokenize(**asked)
    assert contents(asked["destination"]) == before


def test_a_file_system_without_locks_is_one_sentence(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(ValueError, match=r"file system that gives no locks \(No locks available\), so"):
        tokenize(**asked)


def test_a_whole_store_that_lost_a_shard_is_told(asked: dict[str, Any]) -> None:
    told: list[str] = []
    index = tokenize(**asked)
    assert tokenize(**asked, report=told.append) == index
    assert told == []
    (asked["destination"] / "shard-00001.documents").unlink()
    with pytest.raises(
        DamagedStore, match=r"shard-00001\.documents is missing; remove the directory and tokenize anew"
    ):
        tokenize(**asked)


def test_a_whole_store_of_which_shards_were_dropped_is_told(
    asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    index, told = tokenize(**asked), []
    cut(asked["destination"] / "shard-00001.tokens")
    assert main(["data", "check", str(asked["destination"]), "--drop"]) == 0
    assert len(tokenize(**asked, report=told.append).shards) == len(index.shards) - 1
    assert len(told) == 1
    assert "is without 1 of its shards, which were damaged and dropped; remove the directory" in told[0]


def test_names_are_on_the_disk_before_the_journal_tells_of_them(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is flushed after shards and index got their names there, and before anything else is."""
    done: list[str] = []
    replace, fsync = os.replace, os.fsync

    def note(source: Path, target: Path) -> None:
        replace(source, target)
        done.append("name")

    def flush(file: int) -> None:
        fsync(file)
        done.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file")

    monkeypatch.setattr(os, "replace", note)
    monkeypatch.setattr(os, "fsync", flush)
    index = tokenize(**asked)
    after = [done[number + 1] for number, what in enumerate(done) if what == "name"]
    assert after == ["name", "folder"] * len(index.shards) + ["folder"]


def test_a_document_longer_than_a_shard_is_one_of_its_own(tmp_path: Path) -> None:
    """What follows it is in another, also where both are of one piece."""
    lengths = np.array([5, 50, *[5] * 10, 60, 70, 3])
    tokens = np.repeat(lengths, lengths)
    with locked(tmp_path) as file:
        journal = Journal(file, {})
        writer = ShardsWriter(tmp_path, journal, np.dtype("<u2"), 20)
        writer.add(Encoded(tokens, lengths), 0)
        writer.finish(1)
    found = [(shard.num_documents, shard.num_tokens) for shard in journal.shards]
    assert found == [(1, 5), (1, 50), (4, 20), (4, 20), (2, 10), (1, 60), (1, 70), (1, 3)]
    written = b"".join((tmp_path / f"{shard.name}.tokens").read_bytes() for shard in journal.shards)
    assert np.frombuffer(written, "<u2").tolist() == tokens.tolist()
