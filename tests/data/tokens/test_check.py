"""``lightning-dist data check``: which shards are damaged, and a store without them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightning_dist.cli import main
from lightning_dist.data import TokenStore
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
    assert "none would be left" in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path)]) == 2
    assert "no whole token store" in capsys.readouterr().err
