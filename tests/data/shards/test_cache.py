"""Copies of shards from URLs: bounded, shared by processes, made once, whole or not at all, tried again."""

from __future__ import annotations

import multiprocessing
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy as np
import pytest
from upath import UPath

from lightning_dist.data import DamagedShard, ShardCache, ShardDataset, ShardSampler, index_shards
from lightning_dist.data.shards import download as downloads
from tests.data.shards.files import numbered_tables, numbered_tars


@pytest.fixture
def memory() -> Iterator[str]:
    folder = f"memory://{uuid.uuid4().hex}"
    yield folder
    if UPath(folder).exists():
        UPath(folder).fs.rm(folder, recursive=True)


def uploaded(folder: Path, url: str) -> str:
    fs = fsspec.url_to_fs(url)[0]
    for file in sorted(folder.iterdir()):
        fs.put_file(str(file), f"{url}/{file.name}")
    return url


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_PAUSE", 0.0)


@pytest.mark.parametrize("write", [numbered_tars, numbered_tables])
def test_a_cache_stays_in_its_bound_and_gives_every_sample(write: Any, memory: str, tmp_path: Path) -> None:
    url = uploaded(write(tmp_path / "data", [30] * 12), memory)
    assert index_shards([url]).num_samples == 360
    assert UPath(f"{url}/shards.json").exists()
    largest = max(shard.num_bytes for shard in ShardDataset(url).indexes[0].shards)
    cache = ShardCache(tmp_path / "cache", 4 * largest + 60_000)
    data = ShardDataset(url, cache=cache)
    read = []
    for sample in ShardSampler(data, seed=0, window=60):
        read.append(data[sample]["cls"])
        assert cache.num_bytes() <= cache.max_bytes
    assert sorted(read) == list(range(360))
    assert read != sorted(read)
    assert 0 < sum(file.stat().st_size for file in cache.folder.iterdir() if file.is_file()) <= cache.max_bytes


def make(size: int) -> Any:
    def write(file: IO[bytes]) -> None:
        file.write(bytes(size))

    return write


def test_what_was_used_least_recently_goes_first(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 300)
    for number, name in enumerate("abc"):
        cache.open(name, 100, make(100), lambda path: None)
        os.utime(tmp_path / name, (number, number))
    cache.open("a", 100, make(100), lambda path: None)
    cache.open("d", 100, make(100), lambda path: None)
    assert [name in cache for name in "abcd"] == [True, False, True, True]
    with pytest.raises(ValueError, match=r"e has 301 bytes, and the cache .* may have 300"):
        cache.open("e", 301, make(301), lambda path: None)


def test_a_file_that_is_removed_can_be_read_by_who_has_it_open(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 100)
    with cache.open("a", 100, make(100), lambda path: path.open("rb")) as file:
        cache.open("b", 100, make(100), lambda path: None)
        assert "a" not in cache
        assert len(file.read()) == 100


def test_a_file_whose_making_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError("away")

    cache = ShardCache(tmp_path, 100)
    with pytest.raises(OSError, match="away"):
        cache.open("a", 60, fail, lambda path: None)
    assert cache.num_bytes() == 0
    # of a process that was killed
    (tmp_path / "b.incomplete").write_bytes(bytes(80))
    assert cache.open("c", 60, make(60), lambda path: path.stat().st_size) == 60
    assert cache.num_bytes() == 60


def _make_slowly(folder: Path, name: str, log: Path) -> None:
    def write(file: IO[bytes]) -> None:
        with log.open("a") as made:
            made.write(f"{name}\n")
        time.sleep(0.2)
        file.write(bytes(50))

    assert ShardCache(folder, 120).open(name, 50, write, lambda path: path.stat().st_size) == 50


def test_processes_make_a_file_once_and_wait_for_room(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    args = [(tmp_path / "cache", name, tmp_path / "log") for name in ("a", "a", "a", "b", "c")]
    processes = [context.Process(target=_make_slowly, args=each) for each in args]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert sorted((tmp_path / "log").read_text().split()) in (["a", "b", "c"], ["a", "a", "b", "c"])
    assert ShardCache(tmp_path / "cache").num_bytes() <= 120


class Failing:
    """``_copy`` that fails some times before it does its work, or that changes what it copied."""

    def __init__(self, times: int, error: Exception) -> None:
        self.original, self.left, self.error, self.calls = downloads._copy, times, error, 0

    def __call__(self, *args: Any) -> None:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self.error
        self.original(*args)


@pytest.mark.parametrize(("times", "whole"), [(4, True), (5, False)])
def test_reading_that_fails_is_tried_again(
    times: int, whole: bool, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = uploaded(numbered_tars(tmp_path / "data", [3]), memory)
    index_shards([url])
    failing = Failing(times, ConnectionError("reset by peer"))
    monkeypatch.setattr(downloads, "_copy", failing)
    data = ShardDataset(url, cache=tmp_path / "cache")
    if whole:
        assert data[2]["cls"] == 2
    else:
        with pytest.raises(OSError, match=r"shard-0000.tar can't be read, in 5 attempts; the last: .*reset by peer"):
            data[2]
    assert failing.calls == 5


def test_what_is_not_there_is_not_tried_again(memory: str, tmp_path: Path) -> None:
    url = uploaded(numbered_tars(tmp_path / "data", [3]), memory)
    index_shards([url])
    UPath(f"{url}/shard-0000.tar").unlink()
    with pytest.raises(FileNotFoundError):
        ShardDataset(url, cache=tmp_path / "cache")[0]


def test_a_shard_that_has_changed_is_refused(memory: str, tmp_path: Path) -> None:
    url = uploaded(numbered_tars(tmp_path / "data", [3]), memory)
    index_shards([url])
    place = UPath(f"{url}/shard-0000.tar")
    data = bytearray(place.read_bytes())
    data[512] ^= 1  # the first byte of a member
    place.write_bytes(bytes(data))
    with pytest.raises(DamagedShard, match=r"has CRC-32 .*and its index says"):
        ShardDataset(url, cache=tmp_path / "cache")[0]
    assert ShardCache(tmp_path / "cache").num_bytes() == 0


def test_an_order_that_is_read_has_its_next_shards_fetched(memory: str, tmp_path: Path) -> None:
    url = uploaded(numbered_tars(tmp_path / "data", [50] * 20), memory)
    index_shards([url])
    data = ShardDataset(url, cache=tmp_path / "cache")
    order = ShardSampler(data, seed=0, window=100).order(0)
    assert not any(data.cache.folder.glob("*.tar"))
    order.values()
    assert data._prefetcher is None
    samples = iter(order[:400])
    next(samples)
    assert data._prefetcher is not None
    data._prefetcher.wait()
    assert len(list(data.cache.folder.glob("*.tar"))) == 8
    assert len({int(np.searchsorted(data._ends, s, side="right")) for s in order[:400].values()}) == 8


def test_an_object_store_is_read_by_worker_processes(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.data import DataLoader

    access = {"AWS_ENDPOINT_URL": store, "AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"}
    for name, value in {**access, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    bucket = f"b{uuid.uuid4().hex}"
    UPath(f"s3://{bucket}").fs.mkdir(bucket)
    url = uploaded(numbered_tars(tmp_path / "data", [10] * 4), f"s3://{bucket}/train")
    assert index_shards([f"{url}/shard-{{0000..0003}}.tar"]).num_samples == 40
    data = ShardDataset(url, cache=tmp_path / "cache")
    sampler = ShardSampler(data, seed=0)
    loader = DataLoader(data, 4, sampler=sampler, num_workers=2)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert [n for batch in loader for n in batch["cls"].tolist()] == list(sampler.order(epoch))


@pytest.mark.parametrize("method", ["utime", "mkdir"])
def test_a_cache_without_rights_is_told(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:  # who runs the tests may have all rights
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, method, refused)
    cache = ShardCache(tmp_path / "cache")
    with pytest.raises(PermissionError, match=r"the cache .*cache can't be written \(Permission denied\); name"):
        cache.open("name", 1, lambda file: None, Path.read_bytes)
