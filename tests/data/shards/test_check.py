"""``lightning-dist data index`` and ``check``: which shards are damaged, and an index without them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from lightning_dist.cli import main
from lightning_dist.data import ShardCache, ShardDataset
from tests.data.shards.files import numbered_tables, numbered_tars


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-15000])


def cut_at_a_member(path: Path) -> None:
    """Where tarfile takes the rest for the end."""
    path.write_bytes(path.read_bytes()[: 6 * 1024])


def break_a_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[10 * 512 + 148] ^= 1
    path.write_bytes(data)


def break_a_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = {
    "cut": ("tar", cut),
    "at-a-member": ("tar", cut_at_a_member),
    "header": ("tar", break_a_header),
    "empty": ("tar", empty),
    "parquet-cut": ("parquet", lambda path: path.write_bytes(path.read_bytes()[:-50])),
    "parquet-page": ("parquet", break_a_page),
    "parquet-empty": ("parquet", empty),
}


def write(kind: str, folder: Path) -> Path:
    return (numbered_tars if kind == "tar" else numbered_tables)(folder, [40] * 4)


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_shards_are_found_with_and_without_an_index(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    kind, damage = DAMAGES[name]
    folder = write(kind, tmp_path)
    assert main(["data", "check", f"{folder}/*.{kind}"]) == 0
    assert "they have 160 samples" in capsys.readouterr().out
    assert main(["data", "index", str(folder)]) == 0
    assert main(["data", "check", str(folder)]) == 0
    damage(folder / f"shard-0002.{kind}")
    for place in (f"{folder}/*.{kind}", str(folder)):
        assert main(["data", "check", place]) == 1
        shown = capsys.readouterr().out
        assert f"shard-0002.{kind}" in shown
        assert f"shard-0001.{kind}" not in shown
    assert "would leave out 1 of 4 shards, 25.00% of the samples" in shown
    assert main(["data", "check", str(folder), "--drop"]) == 0
    assert main(["data", "check", f"{folder}/shards.json"]) == 0
    data = ShardDataset(folder, cache=tmp_path / "cache")
    assert [data[k]["cls"] for k in range(len(data))] == [*range(80), *range(120, 160)]
    assert json.loads((folder / "shards.json").read_text())["dropped"] == [f"shard-0002.{kind}"]


def test_an_index_of_damaged_shards_is_written_when_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write("tar", tmp_path / "data")
    cut(folder / "shard-0000.tar")
    index = tmp_path / "elsewhere" / "train.json"
    assert main(["data", "index", str(folder), "--output", str(index)]) == 1
    assert not index.exists()
    assert "with --drop it would have the other 3 shards" in capsys.readouterr().out
    assert main(["data", "index", str(folder), "--output", str(index), "--drop"]) == 0
    assert len(ShardDataset(index, cache=tmp_path / "c")) == 120
    assert ShardDataset(index, cache=tmp_path / "c")[0]["cls"] == 40


def test_a_missing_shard_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write("tar", tmp_path)
    main(["data", "index", str(folder)])
    (folder / "shard-0001.tar").unlink()
    assert main(["data", "check", str(folder)]) == 1
    assert "is missing" in capsys.readouterr().out.replace("\n", " ")


def refuses(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    def run(arguments: list[str]) -> str:
        assert main(arguments) == 2
        return capsys.readouterr().err

    return run


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a web server over a folder of shards, and what it was asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            asked.append(f"{self.command} {self.path}")

    write("tar", tmp_path / "shards")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/shards", asked
        server.shutdown()


def test_shards_of_a_web_server_are_read(
    served: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, asked = served
    assert main(["data", "index", address]) == 2
    assert "shards.json can't be written, since a web server is only read; pass a path with --output" in (
        capsys.readouterr().err
    )
    assert not any(".tar" in request for request in asked)
    for sources in (address, f"{address}/*.tar", f"{address}/shard-{{0000..0003}}.tar"):
        assert main(["data", "index", sources, "--output", str(tmp_path / "index.json")]) == 0
    assert main(["data", "check", f"{address}/*.tar"]) == 0
    data = ShardDataset(tmp_path / "index.json", cache=ShardCache(tmp_path / "cache"))
    assert len(data) == 160
    assert main(["data", "index", str(tmp_path / "shards")]) == 0
    assert data[150] == ShardDataset(tmp_path / "shards")[150]


def test_what_can_not_be_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = refuses(capsys)
    folder = write("tar", tmp_path)
    assert "these have none" in run(["data", "check", f"{folder}/*.tar", "--drop"])
    assert "there are no shards at" in run(["data", "index", str(tmp_path / "nothing")])
    assert "no index" in run(["data", "check", str(tmp_path / "none.json")])
    (tmp_path / "bad.json").write_text("{")
    assert "is damaged" in run(["data", "check", str(tmp_path / "bad.json")])
    main(["data", "index", str(folder)])
    for path in folder.glob("*.tar"):
        path.unlink()
    assert "none would be left" in run(["data", "check", str(folder), "--drop"])
