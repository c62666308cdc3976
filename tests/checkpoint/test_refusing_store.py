"""A store that takes no checkpoint for a while: the training goes on, says so, and saves when it can again."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from lightning_dist.checkpoint.store_errors import StoreRefused
from tests.faults.storage import Fails, Store
from tests.support import models
from tests.support.parity import QUIET, slow
from tests.support.ranks import run_on_ranks


class Names(Callback):
    """Notes before each batch which checkpoints are there, and which the callback says are."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, list[tuple[set[str], set[str]]]()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        there = {file.stem for file in self.folder.iterdir()} if self.folder.is_dir() else set()
        callback: Any = trainer.checkpoint_callback
        kept = {callback.best_model_path, callback.last_model_path, *callback.best_k_models} - {""}
        self.seen.append(
            ({name for name in there if name.startswith(("step", "last"))}, {Path(path).stem for path in kept})
        )


def fit(
    folder: Path,
    how: str,
    begin: int,
    end: int,
    rank: int = 0,
    background: bool = False,
    layout: str = "dp_shard=1",
    max_epochs: int = 1,
    **saves: Any,
) -> tuple[list[tuple[set[str], set[str]]], list[str], str | None, set[str]]:
    """16 batches an epoch, with saves every two; the store refuses from one batch to another."""
    L.seed_everything(1, verbose=False)
    world = dist.get_world_size() if dist.is_initialized() else 1
    store, names = Store(folder), Names(folder)
    saves = {"every_n_train_steps": 2, "filename": "{step}", **saves}
    callbacks = [names, Fails(store, how, begin, end, rank), ModelCheckpoint(folder, **saves)]
    strategy = HybridStrategy(layout, async_save=background)
    options = {**QUIET, "enable_checkpointing": True, "devices": world, "strategy": strategy}
    trainer = L.Trainer(**options, max_epochs=max_epochs, callbacks=callbacks)
    error = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(models.Classifier(), DataLoader(models.samples(), batch_size=4 // world))
        except OSError as refused:
            error = f"{type(refused).__name__}: {refused}"
        finally:
            store.recover()
    told = [str(warning.message) for warning in caught if "goes on" in str(warning.message)]
    return names.seen, told, error, {file.stem for file in folder.iterdir() if file.name[0] != "."}


def on(layout: str, *args: Any) -> list[Any]:
    return run_on_ranks(2, _fit, layout, *args) if "=2" in layout else [_fit(layout, *args)]


def _fit(layout: str, folder: Path, options: dict[str, Any]) -> Any:
    return fit(folder, layout=layout, **options)


@pytest.mark.parametrize("background", [False, slow(True)])
@pytest.mark.parametrize("how", ["full", "read-only", "away"])
def test_a_refused_save_is_as_if_it_had_not_been(how: str, background: bool, tmp_path: Path) -> None:
    seen, told, error, left = fit(tmp_path / "store", how, 5, 9, background=background)
    assert error is None
    assert told, how
    assert all(str(tmp_path / "store") in message for message in told)
    assert left == {"step=16"}
    assert seen[5][0] == {"step=4"}
    for there, kept in seen:  # what the callback keeps is there, but for what is on its way
        assert background or not there or kept <= there


@pytest.mark.parametrize(("layout", "how", "rank"), [("dp_shard=2", "full", 1), slow("dp_replicate=2", "away", 0)])
def test_ranks_decide_alike(layout: str, how: str, rank: int, tmp_path: Path) -> None:
    options = {"how": how, "begin": 5, "end": 9, "rank": rank, "save_last": True}
    results = on(layout, tmp_path / "store", options)
    for seen, _, error, left in results:
        assert error is None
        assert left == {"step=16", "last"}
        assert [kept for _, kept in seen] == [kept for _, kept in results[0][0]]
    assert results[0][1]


def test_it_is_tried_again_between_checkpoints(tmp_path: Path) -> None:
    seen, told, _, _ = fit(tmp_path / "store", "away", 3, 9, every_n_train_steps=4)
    assert len(told) == 2  # after batches 4 and 8
    assert "again in 10 batches" in told[0]
    assert "again in 20 batches" in told[1]
    assert seen[12][1] == {"step=12"}
    seen, told, _, left = fit(tmp_path / "other", "away", 12, 15, every_n_train_steps=14, max_epochs=2)
    assert len(told) == 1
    assert [kept for _, kept in seen[14:28]] == [set()] * 10 + [{"step=24"}] * 4
    assert left == {"step=28"}


def test_a_value_is_not_given_to_later_weights(tmp_path: Path) -> None:
    options = {"monitor": "step", "mode": "max", "every_n_train_steps": 5}
    seen, told, error, left = fit(tmp_path / "store", "away", 3, 6, **options)
    assert (len(told), error, left) == (1, None, {"step=15"})
    assert "batches" not in told[0]
    assert [kept for _, kept in seen[5:10]] == [set()] * 5


def test_the_last_state_is_saved_at_the_end_or_missed_aloud(tmp_path: Path) -> None:
    _, told, error, left = fit(tmp_path / "store", "away", 9, 15, every_n_train_steps=14)
    assert (len(told), error, left) == (1, None, {"step=16"})
    _, told, error, left = fit(tmp_path / "other", "away", 15, 99)
    assert error is not None
    assert error.startswith(StoreRefused.__name__)
    assert "could not be written to" in error
    assert left == {"step=14"}


def test_what_the_user_saves_is_refused_aloud(tmp_path: Path) -> None:
    class Saves(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                with pytest.raises(OSError, match="store"):
                    trainer.save_checkpoint(tmp_path / "store" / "own.ckpt")

    store = Store(tmp_path / "store")
    store.fail("away")
    trainer = L.Trainer(**QUIET, devices=1, strategy=HybridStrategy("dp_shard=1"), max_steps=4, callbacks=[Saves()])
    trainer.fit(models.Classifier(), DataLoader(models.samples(), batch_size=4))
