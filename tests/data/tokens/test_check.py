"""``lightning-dist data check``: which shards are damaged, and a store without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightning_dist.cli import main
from lightning_dist.data import TokenStore, index_shards
from tests.data.shards.files import numbered_tars
from tests.data.tokens.stores import numbered


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {"flipped": (flip, "has CRC-32"), "short": (cut, "and"), "missing": (Path.unlink, "is missing")}


@pytest.mark.parametrize("end", [".tokens", ".documents"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shards_are_found_and_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, end: str
) -> None:
    store = numbered(tmp_path / "store", 1000, shard_tokens=100)
    command = ["data", "check", str(store.path)]
    assert main(command) == 0
    assert "as they were written" in capsys.readouterr().out
    shards = store.index.shards
    change, what = DAMAGES[damage]
    change(store.path / f"{shards[2].name}{end}")
    assert main(command) == 1
    told = capsys.readouterr().out
    assert shards[2].name in told
    assert what in " ".join(told.split())
    assert f"1 of {len(shards)} shards" in told
    assert shards[3].name not in told
    assert main([*command, "--drop"]) == 0
    assert main(command) == 0
    start = shards[0].num_tokens + shards[1].num_tokens
    rest = np.concatenate([np.arange(start), np.arange(start + shards[2].num_tokens, 1000)])
    left = TokenStore(store.path)
    assert np.array_equal(left[:], rest)
    assert left.index.dropped == (shards[2].name,)


def test_a_store_with_no_shard_left_is_not_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = numbered(tmp_path / "store", 50)
    flip(store.path / f"{store.index.shards[0].name}.tokens")
    assert main(["data", "check", str(store.path), "--drop"]) == 2
    assert "none would be left; remove the directory, and tokenize anew" in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path)]) == 2
    assert "no whole token store" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "what"),
    [(lambda path: path.write_text("{}"), "has SHA-256"), (Path.unlink, "is missing")],
    ids=["other", "missing"],
)
def test_a_damaged_tokenizer_is_found_and_stays_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], what: str
) -> None:
    store = numbered(tmp_path / "store", 1000, shard_tokens=100, tokenizer="some tokenizer")
    command = ["data", "check", str(store.path)]
    damage(store.tokenizer_file)
    for options in ([], ["--drop"]):
        assert main([*command, *options]) == 1
        told = " ".join(capsys.readouterr().out.split())
        assert f"tokenizer.json {what}" in told
        assert "copy the tokenizer that made the tokens to" in told
        assert "leave out" not in told
    flip(store.path / f"{store.index.shards[2].name}.tokens")
    assert main([*command, "--drop"]) == 1
    assert "dropped 1 of" in capsys.readouterr().out
    store.tokenizer_file.write_text("some tokenizer")
    assert main(command) == 0
    assert "1 were dropped" in capsys.readouterr().out


def test_places_are_checked_each_by_its_own_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stores, shards with an index, and shards without one."""
    stores = [numbered(tmp_path / name, 500, shard_tokens=100) for name in ("train", "held_out")]
    for name in ("indexed", "tars", "more"):
        numbered_tars(tmp_path / name, [3])
    index_shards([tmp_path / "indexed"], tmp_path / "indexed" / "shards.json")
    command = ["data", "check", *(str(tmp_path / name) for name in ("train", "indexed", "held_out", "tars", "more"))]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert f"{tmp_path / 'train'} are as they were written" in told
    assert f"{tmp_path / 'held_out'} are as they were written" in told
    assert f"{tmp_path / 'indexed'} are as they were indexed" in told
    assert "all 2 shards can be read; they have 6 samples" in told
    flip(stores[0].path / f"{stores[0].index.shards[1].name}.tokens")
    assert main(command) == 1
    assert main([*command, "--drop"]) == 2  # nothing is dropped before it is refused
    assert TokenStore(stores[0].path).index.dropped == ()
    assert main([*command[:5], "--drop"]) == 0
    assert TokenStore(stores[0].path).index.dropped == (stores[0].index.shards[1].name,)
