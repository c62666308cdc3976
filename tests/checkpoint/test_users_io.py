"""Checkpoints through a CheckpointIO of the user's: saved, read and removed by it, as in plain Lightning."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from tests.support.models import Words, words
from tests.support.parity import QUIET, Watch, slow, whole_weights
from tests.support.ranks import RankError, run_on_ranks

LAYOUTS = {"dp_shard=1": 1, "dp_replicate=2": 2, "dp_shard=2": 2, "tp=2": 2, "pp=2": 2}


class Pickles(CheckpointIO):
    """Writes a format of its own, two files in a directory of another name, and notes who was asked for what."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def note(self, what: str, path: Any, **more: Any) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        with (self.log.parent / f"{self.log.name}.{rank}").open("a") as file:
            file.write(json.dumps([what, Path(path).name, more]) + "\n")

    def place(self, path: Any) -> Path:
        return Path(f"{path}.pickled")

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.note("save", path, options=storage_options, type=type(path).__name__)
        self.place(path).mkdir(parents=True, exist_ok=True)
        (self.place(path) / "all").write_bytes(pickle.dumps(checkpoint))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        self.note("load", path, weights_only=weights_only)
        return pickle.loads((self.place(path) / "all").read_bytes())

    def remove_checkpoint(self, path: Any) -> None:
        self.note("remove", path)
        (self.place(path) / "all").unlink()
        self.place(path).rmdir()


def fit(
    layout: str | None, folder: Path, io: Any, epochs: int = 3, ckpt: Any = None, saved_as: str = "auto", **more: Any
) -> Any:
    L.seed_everything(1, verbose=False)
    world = dist.get_world_size() if dist.is_initialized() else 1
    strategy: Any = "auto" if layout is None else HybridStrategy(layout, checkpoint_format=saved_as, **more)  # type: ignore[arg-type]
    ranks = 1 if layout is None else strategy.ranks.requested.resolve(world).num_data_ranks
    watch = Watch()
    keeps = ModelCheckpoint(folder, save_top_k=1, monitor="step", mode="max", filename="{step}")
    trainer = L.Trainer(
        **{**QUIET, "enable_checkpointing": True},
        devices=world,
        strategy=strategy,
        max_epochs=epochs,
        callbacks=[watch, keeps],
        plugins=[io],
    )
    trainer.fit(Words(), DataLoader(words(), batch_size=8 // ranks), ckpt_path=ckpt)
    weights = whole_weights(trainer.lightning_module)
    best = keeps.best_model_path
    trainer.save_checkpoint(folder / "options.ckpt", storage_options={"a": 1})
    return watch.losses, weights, best


def with_own(layout: str | None, folder: Path) -> Any:
    fit(layout, folder, Pickles(folder / "log"), 2)
    return fit(layout, folder, Pickles(folder / "log"), 3, folder / "step=12.ckpt")


@pytest.mark.parametrize("layout", ["dp_shard=1", "dp_replicate=2", "dp_shard=2", slow("tp=2"), slow("pp=2")])
def test_a_users_checkpoint_io_saves_loads_and_removes(layout: str, tmp_path: Path) -> None:
    for name in ("plain", "ours"):
        (tmp_path / name).mkdir()
    expected = with_own(None, tmp_path / "plain")
    asked = (tmp_path / "plain" / "log.0").read_text()
    if LAYOUTS[layout] == 1:
        losses, weights, _ = with_own(layout, tmp_path / "ours")
    else:
        losses, weights, _ = run_on_ranks(2, with_own, layout, tmp_path / "ours")[0]
        others = (tmp_path / "ours" / "log.1").read_text()
        assert others.count('"load"') == asked.count('"load"')
        assert '"save"' not in others
    assert (tmp_path / "ours" / "log.0").read_text() == asked
    left = {path.name for path in (tmp_path / "ours").iterdir() if "log" not in path.name}
    assert left == {path.name for path in (tmp_path / "plain").iterdir() if "log" not in path.name}
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights, expected[1], rtol=1e-5, atol=1e-6)


class Background(AsyncCheckpointIO):
    """With options, which torch's own refuses."""

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("storage_options", None)
        super().save_checkpoint(*args, **kwargs)


def in_background(layout: str, folder: Path) -> Any:
    fit(layout, folder, Background(), 2)
    return fit(layout, folder, Background(), 3, folder / "step=12.ckpt")


@pytest.mark.parametrize("layout", ["dp_shard=1", "dp_replicate=2", pytest.param("dp_shard=2", marks=pytest.mark.slow)])
def test_lightnings_async_plugin_resumes(layout: str, tmp_path: Path) -> None:
    expected = in_background("dp_shard=1", tmp_path / "one")
    if LAYOUTS[layout] > 1:
        losses, weights, best = run_on_ranks(2, in_background, layout, tmp_path / "ours")[0]
        torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weights, expected[1], rtol=1e-5, atol=1e-6)
        assert Path(best).is_file(), "one file, as the plugin writes it"
    saved = torch.load(expected[2], weights_only=True)["state_dict"]
    torch.testing.assert_close(saved, expected[1])


class Shouts(TorchCheckpointIO):
    """Lightning's own with another way to save: what it writes is read by Lightning's own."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint({**checkpoint, "shout": "!"}, path)


def best_is_tested(layout: str, folder: Path) -> Any:
    _, _, best = fit(layout, folder, Shouts(), 2)
    assert torch.load(best, weights_only=True)["shout"] == "!"
    return fit(layout, folder, Shouts(), 3, best)[0]


@pytest.mark.slow
def test_a_subclass_of_lightnings_own(tmp_path: Path) -> None:
    expected = best_is_tested("dp_shard=1", tmp_path / "one")
    losses = run_on_ranks(2, best_is_tested, "dp_shard=2", tmp_path / "two")[0]
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)


def test_shards_with_a_checkpoint_io_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RankError, match='choose checkpoint_format="single"') as error:
        run_on_ranks(2, fit, "dp_shard=2", tmp_path, Pickles(tmp_path / "log"), 1, None, "sharded")
    assert str(error.value).count("Traceback") >= 2, "on all ranks"


def test_directories_of_shards_are_read_beside_a_checkpoint_io(tmp_path: Path) -> None:
    expected = run_on_ranks(2, resume_from_shards, tmp_path, False)[0]
    losses = run_on_ranks(2, resume_from_shards, tmp_path, True)[0]
    torch.testing.assert_close(losses, expected)


def resume_from_shards(folder: Path, own: bool) -> list[float]:
    shards = folder / ("own" if own else "none")
    L.seed_everything(1, verbose=False)
    arguments: dict[str, Any] = {**QUIET, "devices": 2}
    first = L.Trainer(**arguments, strategy=HybridStrategy("dp_shard=2"), max_epochs=1)
    loader = DataLoader(words(), batch_size=4)
    first.fit(Words(), loader)
    first.save_checkpoint(shards / "a.ckpt")
    watch = Watch()
    plugins = [Pickles(folder / "log")] if own else []
    strategy = HybridStrategy("dp_shard=2")
    second = L.Trainer(**arguments, strategy=strategy, max_epochs=2, callbacks=[watch], plugins=plugins)
    second.fit(Words(), loader, ckpt_path=shards / "a.ckpt")
    return watch.losses


def test_options_without_a_plugin_are_refused_as_in_plain_lightning(tmp_path: Path) -> None:
    for strategy in ("auto", "hybrid"):
        trainer = L.Trainer(**QUIET, devices=1, strategy=strategy, max_steps=1)
        trainer.fit(Words(), DataLoader(words(), batch_size=8))
        with pytest.raises(TypeError, match="storage_options"):
            trainer.save_checkpoint(tmp_path / "a.ckpt", storage_options={"a": 1})
