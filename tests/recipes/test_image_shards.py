"""Digits in tar and Parquet shards: the numbers of one process, on from any batch, and the config."""

from __future__ import annotations

import functools
import io
import itertools
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sklearn.datasets
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from lightning_dist import HybridStrategy
from lightning_dist.data import index_shards
from recipes import targets
from recipes.image_classification import ImageFolders, ImageShards
from tests.data.shards.files import write_tar
from tests.recipes.runs import vit
from tests.support.parity import QUIET, Losses, whole_weights
from tests.support.ranks import run_on_ranks
from tests.support.source import ROOT

PARTS = {"train": range(0, 320), "val": range(320, 357)}


load_digits = functools.cache(sklearn.datasets.load_digits)


def encoded(number: int) -> tuple[bytes, int]:
    digits = load_digits()
    file = io.BytesIO()
    Image.fromarray(digits.images[number].astype(np.uint8) * 16).save(file, "PNG")
    return file.getvalue(), int(digits.target[number])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    for part, numbers in PARTS.items():
        samples = [encoded(number) for number in numbers]
        for kind in ("tar", "parquet"):
            place = folder / kind / part
            place.mkdir(parents=True)
            for number, start in enumerate(range(0, len(samples), 45)):
                some = samples[start : start + 45]
                if kind == "tar":
                    named = [(f"{start + k:05d}", {"png": png, "cls": b"%d" % y}) for k, (png, y) in enumerate(some)]
                    write_tar(place / f"{number:03d}.tar", named)
                else:
                    table = pyarrow.table({"png": [png for png, _ in some], "cls": [y for _, y in some]})
                    pyarrow.parquet.write_table(table, place / f"{number:03d}.parquet", row_group_size=20)
            index_shards([place])
    return folder


def data_of(folder: Path, kind: str, batch_size: int, workers: int = 0) -> ImageShards:
    places = {part: folder / kind / part for part in PARTS}
    return ImageShards(
        **places, test=places["val"], num_classes=10, image="png", image_size=8, in_channels=1, min_area=None,
        mean=0.3, std=0.4, window=64, cache=folder / "cache", batch_size=batch_size, num_workers=workers,
        eval_batch_size=8,
    )  # fmt: skip


class SavesAt(Callback):
    def __init__(self, path: Path | None, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.path is not None and trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Labels(Callback):
    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(marks(batch[0]))


def marks(images: Tensor) -> list[int]:
    """What tells images apart, but for a few."""
    return (images.sum((1, 2, 3)) * 1000).round().int().tolist()


def train(
    layout: str | None, folder: Path, kind: str, path: Path | None = None, step: int = 0, resume: Path | None = None
) -> dict[str, Any]:
    L.seed_everything(3, verbose=False)
    world = dist.get_world_size() if dist.is_initialized() else 1
    losses, labels, module = Losses(), Labels(), vit()
    trainer = L.Trainer(
        **QUIET, devices=world, strategy=HybridStrategy(layout) if layout else "auto", max_epochs=2,
        callbacks=[losses, labels, SavesAt(path, step)],
    )  # fmt: skip
    ranks = 1 if layout is None else trainer.strategy.num_data_ranks
    resumed: dict[str, Any] = {"ckpt_path": resume, "weights_only": False} if resume else {}
    trainer.fit(module, datamodule=data_of(folder, kind, 32 // ranks), **resumed)
    return {"losses": losses.losses, "seen": labels.seen, "weights": whole_weights(module)}


def together(ranks: list[dict[str, Any]]) -> list[list[int]]:
    return [list(itertools.chain(*zip(*step, strict=True))) for step in zip(*(r["seen"] for r in ranks), strict=True)]


@pytest.mark.parametrize("kind", ["tar", pytest.param("parquet", marks=pytest.mark.slow)])
def test_digits_in_shards_have_the_numbers_of_one_process(kind: str, shards: Path, tmp_path: Path) -> None:
    """And go on within an epoch on two ranks, then on one."""
    one = train(None, shards, kind)
    assert len(one["seen"]) == 20
    data = data_of(shards, kind, 32)
    data.setup("fit")
    every = sorted(marks(torch.stack([image for image, _ in data.parts["train"]])))
    assert len(every) == 320
    for epoch in (one["seen"][:10], one["seen"][10:]):
        assert sorted(itertools.chain(*epoch)) == every
    assert one["seen"][:10] != one["seen"][10:]
    first, second = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    ranks = run_on_ranks(2, train, "dp_shard=2", shards, kind, first, 13)
    assert together(ranks) == one["seen"]
    for rank in ranks:
        torch.testing.assert_close(rank["losses"], one["losses"], rtol=1e-4, atol=1e-5)
        for name, weight in one["weights"].items():
            assert (rank["weights"][name] - weight).norm() <= 1e-3 * weight.norm() + 1e-5, name
    alone = train("dp_shard=1", shards, kind, second, 16, first)
    assert alone["seen"] == one["seen"][13:]
    again = run_on_ranks(2, train, "dp_shard=2", shards, kind, None, 0, second)
    assert together(again) == one["seen"][16:]
    torch.testing.assert_close(again[0]["losses"], one["losses"][16:], rtol=1e-4, atol=1e-5)


def test_tars_and_tables_have_the_same_images(shards: Path) -> None:
    loaders = []
    for kind in ("tar", "parquet"):
        data = data_of(shards, kind, 16)
        data.setup("fit")
        data.setup("test")
        loaders.append([*data.val_dataloader(), *data.test_dataloader(), *data.train_dataloader()])
    assert len(loaders[0]) == 5 + 5 + 20
    for (x, y), (images, labels) in zip(*loaders, strict=True):
        assert torch.equal(x, images)
        assert torch.equal(y, labels)
        assert x.shape[1:] == (1, 8, 8)


def test_what_a_sample_lacks_is_one_sentence(shards: Path) -> None:
    for change, match in (({"label": "json"}, "has no 'json'; it has"), ({"num_classes": 2}, "data.num_classes=2")):
        places = {part: shards / "tar" / part for part in PARTS}
        arguments: dict[str, Any] = {"num_classes": 10, "image": "png", "in_channels": 1, "num_workers": 0, **change}
        data = ImageShards(**places, test=places["val"], cache=shards / "cache", **arguments)
        data.setup("fit")
        with pytest.raises(ValueError, match=match):
            list(data.val_dataloader())


def test_a_scan_of_16_bits_is_scaled_as_one_of_8(tmp_path: Path) -> None:
    images = []
    for number, kind in enumerate((np.uint8, np.uint16)):
        file = io.BytesIO()
        pixels = np.arange(64).reshape(8, 8).astype(kind)
        Image.fromarray(pixels if kind is np.uint8 else pixels * 257).save(file, "PNG")
        place = tmp_path / str(number)
        place.mkdir()
        write_tar(place / "a.tar", [("a", {"png": file.getvalue(), "cls": b"1"})])
        index_shards([place])
        data = ImageShards(place, place, place, 10, "png", image_size=4, in_channels=1, mean=0.3, std=0.4)
        data.setup("test")
        images.append(data.parts["test"][0][0])
    torch.testing.assert_close(*images, rtol=0, atol=3 / 255)  # integers are rounded when they are resized


def test_images_with_transparency_are_those_of_image_folders(tmp_path: Path) -> None:
    draw, samples = np.random.default_rng(0), []
    for mode, channels in (("RGBA", 4), ("LA", 2), ("P", 1), ("L", 1)):
        pixels = draw.integers(0, 256, (40, 40, channels), dtype=np.uint8).squeeze()
        image = Image.fromarray(pixels).convert(mode)
        for part in ("train", "val"):
            (tmp_path / part / "some").mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / part / "some" / f"{mode}.png", **({"transparency": 3} if mode == "P" else {}))
        samples.append((mode, {"png": (tmp_path / "val/some" / f"{mode}.png").read_bytes(), "cls": b"0"}))
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "a.tar", sorted(samples))
    index_shards([tmp_path / "shards"])
    folders = ImageFolders(tmp_path, 1, image_size=28, num_workers=0)
    shards = ImageShards(*[tmp_path / "shards"] * 3, num_classes=1, image="png", image_size=28, num_workers=0)
    grey = ImageShards(*[tmp_path / "shards"] * 3, 1, "png", image_size=28, in_channels=1, mean=0.5, std=0.5)
    for data in (folders, shards, grey):
        data.setup("fit")
    for one, other in zip(folders.parts["val"], shards.parts["val"], strict=True):
        torch.testing.assert_close(other[0], one[0], rtol=0, atol=0.05)  # another resizing: of Pillow and of torch
    assert [image.shape for image, _ in grey.parts["val"]] == [(1, 28, 28)] * 4


def test_the_config_makes_it(shards: Path) -> None:
    with initialize_config_dir(str(ROOT / "conf"), **targets.VERSION_BASE):
        places = [f"data.{part}={shards}/tar/{part}" for part in PARTS]
        options = ["data.num_classes=10", "data.image=png", "data.image_size=16", f"data.cache={shards}/cache"]
        config = compose("config", ["data=image_shards", *places, *options, "data.num_workers=0"])
    data = hydra.utils.instantiate(config.data)
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (64, 3, 16, 16)
    assert labels.dtype == torch.int64
