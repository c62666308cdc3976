"""The files of a folder of data: all that can be reached are there, or it is said."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_dist.data import index_shards
from lightning_dist.data.folders import files_below
from lightning_dist.data.tokens.listing import list_sources
from tests.data.shards.files import numbered_tars


def test_folders_behind_links_are_read_once(tmp_path: Path) -> None:
    """By shards and by text; links that lead back end."""
    numbered_tars(tmp_path / "elsewhere", [2])
    (tmp_path / "elsewhere" / "b.txt").write_text("text")
    numbered_tars(tmp_path / "data" / "v2", [3])
    (tmp_path / "data" / "a.txt").write_text("text")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "latest").symlink_to("v2")
    (tmp_path / "data" / "v2" / "up").symlink_to("..")
    (tmp_path / "data" / "gone.txt").symlink_to("nowhere.txt")
    names = ["a.txt", "more/b.txt", "more/shard-0000.tar", "v2/shard-0000.tar"]
    assert [path.relative_to(tmp_path / "data").as_posix() for path in files_below(tmp_path / "data")] == names
    assert [file.name for file in list_sources([tmp_path / "data"])] == ["0/a.txt", "0/more/b.txt"]
    assert index_shards([tmp_path / "data"], tmp_path / "shards.json").num_samples == 5


def test_a_folder_that_can_not_be_listed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbered_tars(tmp_path / "data", [2])
    (tmp_path / "data" / "secret").mkdir()
    listed = os.scandir

    def scandir(path: str) -> Iterator[os.DirEntry]:  # who runs the tests may have all rights
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for read in (list_sources, index_shards):
        with pytest.raises(PermissionError, match=r"data/secret can't be listed \(Permission denied\), so"):
            read([tmp_path / "data"])
