"""``lightning-dist tokenize``: the library's tokens, from any source, to the same bytes from any interruption."""

from __future__ import annotations

import gzip
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

from lightning_dist.cli import main
from lightning_dist.data import TokenStore, tokenize
from lightning_dist.data.tokens import encode, sources
from lightning_dist.data.tokens.listing import fingerprint, list_sources
from lightning_dist.data.tokens.writer import locked
from tests.data.tokens.stores import END, train_tokenizer

WORDS = ["the", "of", "Anne", "Elliot", "said", "été", "海", "def", "return", "self", "\n\n", "    ", END, "{}"]


def texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(1, 60))) for _ in range(count)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> tokenizers.Tokenizer:
    return train_tokenizer(tmp_path / "tokenizer.json", texts(50))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small sources are many pieces."""
    monkeypatch.setattr(sources, "PIECE_BYTES", 2000)


def write_folder(folder: Path) -> list[str]:
    """Sources of every kind, and their documents in order; a mark for a text file that is no source."""
    folder.mkdir()
    parts = [texts(40, seed) for seed in range(5)]
    for number, text in enumerate(parts[0]):
        (folder / f"a{number:02d}.txt").write_bytes(text.encode())
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": text, "n": 1}) for text in parts[1]))
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in parts[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": [*parts[3], None, ""]}), folder / "d.parquet", row_group_size=9)
    (folder / "sub").mkdir()
    (folder / "sub" / "e.md").write_text(parts[4][0])
    (folder / "empty.txt").write_text("")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return [*parts[0], *parts[1], *parts[2], *parts[3], parts[4][0]]


def contents(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


@pytest.mark.parametrize("workers", [1, 3])
def test_tokens_are_those_of_the_library_document_by_document(
    tmp_path: Path, tokenizer: tokenizers.Tokenizer, workers: int
) -> None:
    documents = write_folder(tmp_path / "texts")
    options = {"shard_tokens": 500, "end_of_document": END, "workers": workers}
    tokenize([tmp_path / "texts"], tmp_path / "store", tmp_path / "tokenizer.json", **options)
    store = TokenStore(tmp_path / "store")
    end = tokenizer.token_to_id(END)
    wanted = [[*tokenizer.encode(text, add_special_tokens=False).ids, end] for text in documents]
    assert store[:].tolist() == list(itertools.chain(*wanted))
    assert store.document_starts(0, len(store)).tolist() == np.cumsum([0, *map(len, wanted[:-1])]).tolist()
    assert store.vocab_size == tokenizer.get_vocab_size()
    assert len(store.index.shards) > 10
    assert all(shard.num_tokens <= 500 for shard in store.index.shards)
    assert not list(store.path.glob("unfinished*"))
    decoder = tokenizers.Tokenizer.from_file(str(store.tokenizer_file))
    assert decoder.decode(store[: len(wanted[0]) - 1].tolist(), skip_special_tokens=False) == documents[0]


def interrupted(arguments: dict[str, Any], last: int, pids: Path) -> None:
    """Tokenizes until so many bytes are done, and is killed; notes its workers."""

    def kill(done: int, total: int) -> None:
        if done >= last:
            pids.write_text(json.dumps([child.pid for child in multiprocessing.active_children()]))
            os.kill(os.getpid(), signal.SIGKILL)

    tokenize(**arguments, progress=kill)


def run_in_process(function: Callable[[], None]) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join()
    return process.exitcode


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_run_goes_on_to_the_same_bytes_with_other_workers(
    tmp_path: Path, tokenizer: tokenizers.Tokenizer
) -> None:
    """Killed in each third, with half a line in the journal; nobody is left running."""
    write_folder(tmp_path / "texts")
    arguments = {
        "sources": [tmp_path / "texts"], "tokenizer": tmp_path / "tokenizer.json", "shard_tokens": 700, "workers": 2
    }  # fmt: skip
    tokenize(**arguments, destination=tmp_path / "undisturbed")
    total = fingerprint(list_sources([tmp_path / "texts"]))["bytes"]
    arguments["destination"] = store = tmp_path / "store"
    for third, workers in ((1, 1), (2, 3)):
        arguments["workers"] = workers
        end = run_in_process(partial(interrupted, arguments, third * total // 3, tmp_path / "pids"))
        assert end == -signal.SIGKILL
        workers_left = json.loads((tmp_path / "pids").read_text())
        assert len(workers_left) == workers
        deadline = time.monotonic() + 30
        while any(map(is_running, workers_left)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(FileNotFoundError, match="no whole token store"):
            TokenStore(store)
        journal = store / "unfinished.jsonl"
        assert len(journal.read_bytes().splitlines()) > 2
        with journal.open("ab") as file:
            file.write(b'{"shard": {"name": "shard-0')
        (store / "shard-00099.tokens").write_bytes(b"of a shard that no line tells of")
    begun: list[int] = []
    tokenize(**arguments, progress=lambda done, total: begun.append(done))
    assert begun[0] > total / 2  # it went on, and did not begin anew
    assert contents(store) == contents(tmp_path / "undisturbed")


def test_a_store_that_is_whole_stays(tmp_path: Path, tokenizer: tokenizers.Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("some text")
    command = ["tokenize", str(tmp_path / "a.txt"), str(tmp_path / "store"), "--tokenizer", str(tmp_path)]
    assert main([*command, "--workers", "1"]) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    assert main([*command, "--workers", "2"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()} == before


def test_a_store_that_is_whole_is_taken_by_many_who_ask_for_it_at_once(
    tmp_path: Path, tokenizer: tokenizers.Tokenizer
) -> None:
    (tmp_path / "a.txt").write_text("some text")
    arguments: Any = ([tmp_path / "a.txt"], tmp_path / "store", tmp_path / "tokenizer.json")
    index = tokenize(*arguments, workers=1)
    with locked(tmp_path / "store"):  # as another process that asks
        assert run_in_process(lambda: tokenize(*arguments)) == 0
    assert not (tmp_path / "store" / "unfinished.jsonl").exists()
    assert tokenize(*arguments) == index


def test_a_store_within_its_source_goes_on(tmp_path: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Its own files, of which the journal ends in .jsonl, are none of the text."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("some text")
    store = tmp_path / "texts" / "store"
    arguments: Any = ([tmp_path / "texts"], store, tmp_path / "tokenizer.json")
    index = tokenize(*arguments, workers=1)
    (store / "index.json").unlink()
    (store / "unfinished.jsonl").write_text(json.dumps(index.settings) + "\n")
    assert tokenize(*arguments, workers=1) == index
    assert tokenize(*arguments, workers=1, pattern="*") == index


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("tokenizer", "the tokenizer differ"),
        ("sources", "the sources (their names, sizes or times of change) differ"),
        ("options", "--shard-tokens and --end-of-document differ"),
    ],
)
def test_a_store_of_something_else_is_not_mixed_with(
    tmp_path: Path, tokenizer: tokenizers.Tokenizer, whole: bool, change: str, named: str
) -> None:
    (tmp_path / "a.txt").write_text("some text")
    asked: dict[str, Any] = {"sources": [tmp_path / "a.txt"], "destination": tmp_path / "store", "workers": 1}
    asked["tokenizer"] = tmp_path / "tokenizer.json"
    index = tokenize(**asked)
    if not whole:
        (tmp_path / "store" / "index.json").unlink()
        (tmp_path / "store" / "unfinished.jsonl").write_text(json.dumps(index.settings) + "\n")
    if change == "tokenizer":
        train_tokenizer(tmp_path / "tokenizer.json", texts(50, 1), 300)
    elif change == "sources":
        (tmp_path / "a.txt").write_text("another text")
    else:
        asked |= {"end_of_document": END, "shard_tokens": 5}
    before = contents(tmp_path / "store")
    with pytest.raises(ValueError, match="holds tokens made otherwise") as error:
        tokenize(**asked)
    assert named in str(error.value)
    assert {name: data for name, data in contents(tmp_path / "store").items() if name != "unfinished.jsonl"} == {
        name: data for name, data in before.items() if name != "unfinished.jsonl"
    }


def test_what_can_not_be_is_one_sentence(
    tmp_path: Path, tokenizer: tokenizers.Tokenizer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "none").mkdir()

    def told(source: str, *options: str, destination: str = "store", tokenizer: str = "tokenizer.json") -> str:
        command = ["tokenize", str(tmp_path / source), str(tmp_path / destination), "--tokenizer"]
        assert main([*command, str(tmp_path / tokenizer), "--workers", "1", *options]) == 2
        return capsys.readouterr().err

    assert "is not there" in told("missing.txt")
    assert "is not there" in told("a.txt", tokenizer="missing.json")
    assert "can't be read by the library" in told("a.txt", tokenizer="a.txt")
    assert "none matches" in told("none")
    assert "has no token '<eos>'" in told("a.txt", "--end-of-document", "<eos>")
    assert "at least 1" in told("a.txt", "--shard-tokens", "0")
    assert "is there and no token store" in told("a.txt", destination="")
    assert "there is no text" in told("empty.txt", destination="of_nothing")
    assert """no JSON object with a text 'text', which begins '{"txt": "bad"}'""" in told(
        "bad.jsonl", destination="bad"
    )
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"any": 0}, unk_token="none"))
    words.save(str(tmp_path / "words.json"))
    assert "a.txt: WordLevel error: Missing" in told("a.txt", tokenizer="words.json", destination="words")
    with pytest.raises(ValueError, match=r"a\.txt is named twice"):
        list_sources([tmp_path / "a.txt", tmp_path])
    for name, data in {
        "cut.jsonl.gz": gzip.compress(b'{"text": "some"}\n' * 50)[:-20],
        "other.jsonl.gz": b'{"text": "some"}',
        "cut.txt.gz": gzip.compress(b"some text")[:-9],
        "deep.jsonl": b"[" * 100_000,
        "cut.parquet": b"PAR1",
    }.items():
        (tmp_path / name).write_bytes(data)
        assert f"{name} " in told(name, destination=f"of {name}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install 'lightning-dist[tokens]'" in told("a.txt", destination="without")


def test_a_second_writer_is_refused(tmp_path: Path, tokenizer: tokenizers.Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("some text")
    arguments: Any = ([tmp_path / "a.txt"], tmp_path / "store", tmp_path / "tokenizer.json")
    ends: list[int | None] = []

    def again() -> None:
        with pytest.raises(ValueError, match="another process is writing"):
            tokenize(*arguments, workers=1)

    tokenize(*arguments, workers=1, progress=lambda done, total: ends.append(run_in_process(again)))
    assert ends == [0, 0]


def test_a_long_document_is_encoded_in_parts_that_are_its_text(
    tmp_path: Path, tokenizer: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "PART", 100)
    long = "\n".join(texts(60)) + "x" * 450 + "\nend"
    for number, text in enumerate(["before", long, "after"]):
        (tmp_path / f"{number}.txt").write_text(text)
    tokenize([tmp_path / f"{n}.txt" for n in range(3)], tmp_path / "store", tmp_path / "tokenizer.json", workers=1)
    store = TokenStore(tmp_path / "store")
    starts = [*store.document_starts(0, len(store)).tolist(), len(store)]
    decoded = [tokenizer.decode(store[a:b].tolist(), skip_special_tokens=False) for a, b in itertools.pairwise(starts)]
    assert decoded == ["before", long, "after"]


def test_documents_of_no_token_are_left_out_however_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tokenizer that knows some letters alone."""
    monkeypatch.setattr(encode, "PART", 100)
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, END: 1}, [])).save(str(tmp_path / "tokenizer.json"))
    for number, text in enumerate(["a", "x", "other " * 50, "b a a"]):
        (tmp_path / f"{number}.txt").write_text(text)
    for end, lengths in ((None, [1, 2]), (END, [2, 3])):
        index = tokenize([tmp_path], tmp_path / f"{end}", tmp_path, workers=1, end_of_document=end)
        store = TokenStore(tmp_path / f"{end}")
        assert index.num_documents == 2
        assert np.diff([*store.document_starts(0, len(store)), len(store)]).tolist() == lengths


def test_half_a_character_in_json_is_one_that_can_not_be_read(tmp_path: Path, tokenizer: tokenizers.Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "some \\ud83d text \\ud83d\\ude00"}')
    tokenize([tmp_path / "a.jsonl"], tmp_path / "store", tmp_path / "tokenizer.json", workers=1)
    assert tokenizer.decode(TokenStore(tmp_path / "store")[:].tolist()) == "some \ufffd text \U0001f600"
