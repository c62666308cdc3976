"""Samples of tars and tables: what is in them, by index, wherever they are."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from lightning_dist.data import DamagedShard, ShardCache, ShardDataset, ShardSampler, index_shards
from lightning_dist.data.shards.decoding import decode_image
from lightning_dist.data.shards.index import Shard, ShardIndex, expand_braces, kind_of, list_shards, write_index
from lightning_dist.data.shards.tars import split_name
from tests.data.shards.files import numbered_tables, numbered_tars, write_tar


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize("write", [numbered_tars, numbered_tables])
def test_every_sample_is_the_one_of_its_number(write, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", [7, 1, 12])
    assert index_shards([folder]).num_samples == 20
    data = ShardDataset(folder, cache=tmp_path / "cache")
    assert [data[k]["cls"] for k in range(20)] == list(range(20))
    assert data[np.int64(19)]["cls"] == 19
    for index in (20, -1):
        with pytest.raises(IndexError):
            data[index]
    again = pickle.loads(pickle.dumps(data))
    assert again[8] == data[8]
    batches = [batch["cls"] for batch in DataLoader(data, 4, num_workers=2)]
    assert torch.cat(batches).tolist() == list(range(20))


def test_samples_of_tars_are_those_of_webdataset(tmp_path: Path) -> None:
    """Whose reader says what a sample is: names, groups, extensions."""
    parts = {"Seg.PNG": png(np.arange(12, dtype=np.uint8).reshape(3, 4)), "txt": "é".encode(), "pyd": b"raw"}
    long = "folder/" + "x" * 150
    samples = [("a/b.c/one", {"cls": b"3"}), (long, parts), ("a/two", {"json": b'{"x": [1]}', "cls": b"4"})]
    path = write_tar(tmp_path / "a.tar", samples)
    index_shards([path])
    data = ShardDataset(tmp_path, decoders={name: None for name in ("cls", "png", "txt", "json")}, cache=tmp_path / "c")
    theirs = webdataset.WebDataset(str(path), shardshuffle=False)
    for ours, other in zip(data, theirs, strict=True):
        assert ours == {name: value for name, value in other.items() if name not in ("__url__", "__local_path__")}
    decoded = ShardDataset(tmp_path, cache=tmp_path / "c")
    assert decoded[1]["seg.png"].tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]]
    assert (decoded[1]["txt"], decoded[2]["json"], decoded[0]["cls"]) == ("é", {"x": [1]}, 3)
    assert split_name("./a.b/c.d.e") == ("a.b/c", "d.e")


def test_members_that_are_no_part_of_a_sample_are_left_out_as_in_webdataset(tmp_path: Path) -> None:
    """Files without an extension, those that macOS puts beside others, and WebDataset's own; not what only looks so."""
    names = ["README", "._a.txt", "a.txt", "__info__", "__own__/b.txt", "__b.txt", "d/__c__", "d/LICENSE", "d/c.txt"]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    assert index_shards([tmp_path / "a.tar"]).num_samples == 3
    ours = [sample["__key__"] for sample in ShardDataset(tmp_path, cache=tmp_path / "c")]
    theirs = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    assert ours == [sample["__key__"] for sample in theirs] == ["a", "__b", "d/c"]
    assert split_name("d/._c.txt") is None


def test_names_that_are_not_utf_8_are_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("café.bin"))
    index_shards([tmp_path / "a.tar"])
    key = ShardDataset(tmp_path, cache=tmp_path / "c")[0]["__key__"]
    assert os.fsencode(key) == "café".encode("latin-1")


def test_a_tar_that_was_written_anew_is_not_read_where_the_old_members_were(tmp_path: Path) -> None:
    """To as many bytes, which nothing else on the disk tells."""
    path = write_tar(tmp_path / "a.tar", [("a", {"txt": b"short"}), ("b", {"txt": b"long" * 200})])
    index_shards([path])
    assert ShardDataset(tmp_path, cache=tmp_path / "c")[0] == {"__key__": "a", "txt": "short"}
    size = path.stat().st_size
    write_tar(path, [("b", {"txt": b"LONG" * 200}), ("a", {"txt": b"SHORT"})])
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert path.stat().st_size == size
    again = ShardDataset(tmp_path, cache=tmp_path / "c")
    assert [again[0]["txt"], again[1]["txt"]] == ["LONG" * 200, "SHORT"]


def test_what_brings_code_is_not_run(tmp_path: Path) -> None:
    class Mean:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    parts = {"pkl": pickle.dumps(Mean()), "pth": saved({"x": torch.ones(2)}), "npy": npy(np.arange(3))}
    bad = {"pth": pickle.dumps(Mean()), "npy": npy(np.array([Mean()], dtype=object))}
    samples = [("good", parts), *((end, {end: data}) for end, data in bad.items())]
    index_shards([write_tar(tmp_path / "a.tar", samples)])
    data = ShardDataset(tmp_path, cache=tmp_path / "c")
    assert isinstance(data[0]["pkl"], bytes)
    assert data[0]["pth"]["x"].tolist() == [1, 1]
    assert data[0]["npy"].tolist() == [0, 1, 2]
    for index in (1, 2):
        with pytest.raises(ValueError, match=r"of sample '\w+' in .*a.tar can't be decoded"):
            data[index]
    assert not (tmp_path / "ran").exists()


def test_images_of_every_mode_are_decoded_or_refused() -> None:
    """What has values of any range would come out white, or black."""
    grey = np.full((2, 3), 200, np.uint8)
    for mode, channels in (("L", 1), ("LA", 4), ("1", 1), ("P", 3), ("RGB", 3), ("RGBA", 4)):
        file = io.BytesIO()
        Image.fromarray(grey).convert(mode).save(file, "PNG")
        assert decode_image(file.getvalue()).shape == (channels, 2, 3), mode
    for wide in (grey.astype(np.int32), grey.astype(np.float32)):
        file = io.BytesIO()
        Image.fromarray(wide).save(file, "TIFF")
        with pytest.raises(ValueError, match="values of any range; pass a function"):
            decode_image(file.getvalue())


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian TIFF"])
def test_grey_of_16_bits_is_whole(kind: str) -> None:
    scan = (np.arange(6).reshape(2, 3) * 13_107).astype(np.uint16)
    if kind == "big-endian TIFF":
        image: Image.Image = Image.frombytes("I;16B", (3, 2), scan.astype(">u2").tobytes())
    else:
        image = Image.fromarray(scan)
    file = io.BytesIO()
    image.save(file, kind.rpartition(" ")[2])
    pixels = decode_image(file.getvalue())
    assert pixels.dtype == torch.uint16
    assert pixels.tolist() == [scan.tolist()]


def test_columns_of_tables_are_chosen_and_decoded(tmp_path: Path) -> None:
    index_shards([numbered_tables(tmp_path / "t", [6])])
    data = ShardDataset(
        tmp_path / "t",
        columns=["cls", "data"],
        decoders={"data": "cls"},
        transform=lambda row: row,
        cache=tmp_path / "c",
    )
    assert data[4] == {"cls": 4, "data": 4}
    # the file has them in another order than that of their names
    assert ShardDataset(tmp_path / "t", columns=["name", "data"], cache=tmp_path / "c")[4] == {
        "name": "n4",
        "data": b"4",
    }
    with pytest.raises(ValueError, match="has no column 'label'; it has cls, name, data"):
        ShardDataset(tmp_path / "t", columns=["label"], cache=tmp_path / "c")[0]


def test_an_image_of_hugging_faces_tables_is_decoded(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": png(np.full((2, 2, 3), k, np.uint8)), "path": None} for k in range(3)]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": [0, 1, 2]}), tmp_path / "a.parquet")
    index_shards([tmp_path])
    data = ShardDataset(tmp_path, decoders={"image": "png"}, cache=tmp_path / "c")
    assert data[2]["image"].shape == (3, 2, 2)
    assert int(data[2]["image"][0, 0, 0]) == 2


def test_ten_thousand_shards_are_listed_and_shuffled_without_their_files(tmp_path: Path) -> None:
    """None of which is there."""
    shards = tuple(Shard(f"s-{k:05d}.tar", 1 << 30, 900 + k % 200, k) for k in range(10_000))
    write_index(tmp_path, ShardIndex(str(tmp_path), "tar", shards))
    data = ShardDataset(tmp_path, cache=tmp_path / "c")
    sampler = ShardSampler(data, seed=0)
    assert len(sampler) == len(data) == sum(shard.num_samples for shard in shards)
    first = list(sampler.order(0)[:1000])
    assert len(set(first)) == 1000
    assert first != list(sampler.order(1)[:1000])
    with pytest.raises(FileNotFoundError):
        data[first[0]]
    assert len(list(expand_braces("s-{00000..09999}.tar"))) == 10_000


def test_patterns_of_shards_are_expanded_as_in_a_shell(tmp_path: Path) -> None:
    assert list(expand_braces("{a,b}-{08..10}.tar")) == [f"{x}-{n}.tar" for x in "ab" for n in ("08", "09", "10")]
    assert list(expand_braces("plain-{x}.tar")) == ["plain-{x}.tar"]
    folder = numbered_tars(tmp_path, [1, 1, 1])
    names = [str(folder / f"shard-{k:04d}.tar") for k in range(3)]
    for pattern in (folder, f"{folder}/*.tar", f"{folder}/shard-{{0000..0002}}.tar"):
        assert list_shards([pattern]) == ("tar", names)
    assert list_shards([f"{folder}/shard-{{0001..0000}}.tar"])[1] == names[1::-1]
    with pytest.raises(ValueError, match=r"shard-0001\.tar is named twice"):
        list_shards([names[1], folder])


def test_what_can_not_be_is_one_sentence(tmp_path: Path) -> None:
    tars = numbered_tars(tmp_path / "tars", [2])
    with pytest.raises(FileNotFoundError, match=r"no index of shards .*lightning-dist data index"):
        ShardDataset(tars)
    with pytest.raises(FileNotFoundError, match="there are no shards at"):
        list_shards([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="is compressed as a whole"):
        list_shards(["a.tar.gz"])
    with pytest.raises(ValueError, match="is no shard; shards are"):
        kind_of("a.zip")
    with pytest.raises(ValueError, match="of several kinds, parquet and tar"):
        list_shards([tars, numbered_tables(tmp_path / "tables", [2])])
    index_shards([tars])
    with pytest.raises(ValueError, match="are of Parquet files"):
        ShardDataset(tars, columns=["a"])
    with pytest.raises(ValueError, match="there is no decoder 'gif2'"):
        ShardDataset(tars, decoders={"x": "gif2"})
    with pytest.raises(ValueError, match="leave one of them out"):
        ShardSampler(ShardDataset([tars, tars]), weights=(1, 1), num_canonical_ranks=2)
    with pytest.raises(ValueError, match="at least 1"):
        ShardSampler(ShardDataset(tars), window=0)
    (tars / "shard-0000.tar").write_bytes(b"")
    with pytest.raises(DamagedShard, match="has 0 bytes, and its index says"):
        ShardDataset(tars, cache=tmp_path / "c")[0]
    (tars / "shard-0000.tar").unlink()
    with pytest.raises(FileNotFoundError, match="is missing, which its index has; run `lightning-dist data check`"):
        ShardDataset(tars, cache=tmp_path / "c")[0]


def test_a_window_that_the_cache_can_not_hold_is_told(tmp_path: Path) -> None:
    shards = tuple(Shard(f"memory://away/{k}.tar", 1000, 10, k) for k in range(100))
    write_index(tmp_path, ShardIndex(str(tmp_path), "tar", shards))
    data = ShardDataset(tmp_path, cache=ShardCache(tmp_path / "c", 5000))
    with pytest.warns(UserWarning, match="fetched again and again"):
        ShardSampler(data, window=100)
    ShardSampler(data, window=40)
