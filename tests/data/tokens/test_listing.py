"""Which files are tokenized, and as what: none as something that it is not, none twice, none left out unsaid."""

from __future__ import annotations

import bz2
import gzip
import json
import zipfile
from pathlib import Path

import pytest
import tokenizers

from lightning_dist.cli import main
from lightning_dist.data import TokenStore, tokenize
from lightning_dist.data.tokens.listing import list_sources
from tests.data.tokens.stores import train_tokenizer

LINES = b"".join(json.dumps({"text": f"text {number}", "url": "x"}).encode() + b"\n" for number in range(3))
DOCUMENT = json.dumps([{"text": "one"}, {"text": "two"}], indent=1).encode()


@pytest.fixture
def tokenizer(tmp_path: Path) -> tokenizers.Tokenizer:
    return train_tokenizer(tmp_path / "tokenizer.json", ["some text"])


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("c4-train.00000.json.gz", LINES),
        ("a.json", LINES),
        ("a.json", b"\xef\xbb\xbf" + LINES),
        ("a.JSON", LINES.split(b"\n")[0]),
    ],
    ids=["compressed", "lines", "mark", "one line"],
)
@pytest.mark.parametrize("in_folder", [True, False])
def test_json_may_be_lines(
    tmp_path: Path, tokenizer: tokenizers.Tokenizer, name: str, data: bytes, in_folder: bool
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    source = tmp_path / "texts" if in_folder else tmp_path / "texts" / name
    index = tokenize([source], tmp_path / "store", tmp_path, workers=1)
    wanted = "".join(json.loads(line)["text"] for line in data.decode("utf-8-sig").split("\n") if line.strip())
    assert tokenizer.decode(TokenStore(tmp_path / "store")[:].tolist()) == wanted
    assert index.num_documents == wanted.count("text")


NO_TEXT = [
    ("latin.txt", "some été".encode("latin-1"), "by its byte 5 (of value 0xe9)"),
    ("utf16.txt", "some text".encode("utf-16"), "by its byte 0 (of value 0xff)"),
    ("utf16.md", "some text".encode("utf-16-le"), "by its byte 1 (of value 0x00)"),
    ("table.csv.gz", gzip.compress(b"a" * 10_000 + b"\xff"), "unpacked, is no text in UTF-8, by its byte 10,000"),
    ("picture.png", b"\x89PNG\r\n", "by its byte 0"),
]


@pytest.mark.parametrize(("name", "data", "what"), NO_TEXT, ids=[case[0] for case in NO_TEXT])
def test_what_is_no_text_is_refused_by_its_first_such_byte(
    tmp_path: Path, tokenizer: tokenizers.Tokenizer, capsys: pytest.CaptureFixture[str], name: str, data: bytes,
    what: str,
) -> None:  # fmt: skip
    (tmp_path / name).write_bytes(data)
    command = ["tokenize", str(tmp_path / name), str(tmp_path / "store"), "--tokenizer", str(tmp_path)]
    assert main([*command, "--workers", "1"]) == 2
    told = capsys.readouterr().err
    assert str(tmp_path / name) in told
    assert what in told


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "unpack it"),
        ("a.jsonl.bz2", bz2.compress(LINES), "unpack it"),
        ("a.tar.gz", gzip.compress(LINES), "unpack it"),
        ("a.json", DOCUMENT, "is not JSON lines"),
        ("a.json", json.dumps([{"text": "some"}]).encode() + b"\n", "is not JSON lines"),
        ("a.json", b"[" + b"1," * 1_000_000 + b"1]", "is not JSON lines"),
        ("a.json.gz", gzip.compress(DOCUMENT), "is not JSON lines"),
        ("a.json.gz", gzip.compress(LINES)[:-9], "is damaged"),
    ],
    ids=["zstd", "bzip2", "archive", "document", "one line", "long line", "compressed document", "damaged"],
)
def test_what_can_not_be_read_is_refused_before_anything_is(tmp_path: Path, name: str, data: bytes, what: str) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / name).write_bytes(data)
    for source, pattern in ((tmp_path / "texts", "*"), (tmp_path / "texts" / name, None)):
        with pytest.raises(ValueError, match=what) as error:
            list_sources([source], pattern)
        assert str(tmp_path / "texts" / name) in str(error.value)


def test_an_archive_is_refused_by_what_is_in_it(tmp_path: Path, tokenizer: tokenizers.Tokenizer) -> None:
    with zipfile.ZipFile(tmp_path / "some.book", "w") as archive:
        archive.writestr("a.txt", "some text")
    with pytest.raises(ValueError, match="is no text in UTF-8"):
        tokenize([tmp_path / "some.book"], tmp_path / "store", tmp_path, workers=1)


def test_files_of_a_folder_that_are_not_read_are_told(
    tmp_path: Path, tokenizer: tokenizers.Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """But those of the store itself, and those that a pattern leaves out."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.jsonl.zst", "b.v1.jsonl.zst", "c.png", "LICENSE"):
        (folder / name).write_bytes(b"x")
    (folder / "dataset_infos.json").write_bytes(DOCUMENT)
    (folder / "a.txt").write_text("some text")
    command = ["tokenize", str(folder), str(folder / "store"), "--tokenizer", str(tmp_path), "--workers", "1"]
    for _ in range(2):
        assert main(command) == 0
        told = capsys.readouterr().err
        assert f"{folder} has files that are not read, 5 by the ends of their names: 2 .jsonl.zst, 1 " in told
        assert all(end in told for end in ("1 .png", "1 without an end", "1 .json of one document;"))
    assert main([*command[:2], str(tmp_path / "other"), *command[3:], "--pattern", "*.txt"]) == 0
    assert "not read" not in capsys.readouterr().err


def test_a_file_behind_links_is_read_once(tmp_path: Path) -> None:
    """In a folder the first is kept, also of a cache whose files are named without an end; sources are told."""
    cache, told = tmp_path / "cache", []
    for name in ("blobs", "snapshots/one", "snapshots/two"):
        (cache / name).mkdir(parents=True)
    for number in range(2):
        (cache / "blobs" / f"{number}abc").write_text("some text")
        for revision in ("one", "two"):
            (cache / "snapshots" / revision / f"{number}.txt").symlink_to(f"../../blobs/{number}abc")
    (cache / "snapshots" / "two" / "2.txt").write_text("some text")
    names = ["0/snapshots/one/0.txt", "0/snapshots/one/1.txt", "0/snapshots/two/2.txt"]
    for pattern in (None, "*.txt"):
        assert [file.name for file in list_sources([cache], pattern, report=told.append)] == names
    assert told == []
    one, two = cache / "snapshots" / "one", cache / "snapshots" / "two"
    for sources in ([one, two], [one / "0.txt", two / "0.txt"]):
        with pytest.raises(ValueError, match=r"two/0\.txt is .*one/0\.txt once more, behind a link, so its documents"):
            list_sources(sources)
    (tmp_path / "link").symlink_to(one)
    with pytest.raises(ValueError, match=r"once more, behind a link"):
        list_sources([one, tmp_path / "link"])
