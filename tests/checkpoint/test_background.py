"""Saves beside the training: what they hold, what they wait for, and what becomes of their errors."""

from __future__ import annotations

import threading
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy, checkpoint
from lightning_dist.checkpoint.background import BackgroundSaves
from lightning_dist.checkpoint.checksums import ChecksumFileSystem
from lightning_dist.checkpoint.host_memory import HostMemory
from lightning_dist.dtensors import full
from tests.checkpoint.training import build, damage
from tests.support import models
from tests.support.models import samples
from tests.support.parity import QUIET
from tests.support.ranks import RankError, run_on_ranks

LAYOUTS = [
    *[("dp_shard=1", 1), ("dp_shard=2", 2), ("dp_replicate=2", 2), ("pp=2", 2)],
    *(pytest.param(layout, 4, marks=pytest.mark.slow) for layout in ("dp_shard=2,tp=2", "dp_replicate=2,dp_shard=2")),
]


class Both(Callback):
    """Saves the same moment twice, and holds the save in the background until three steps later."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.held, self.while_held = folder, threading.Event(), []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        strategy: Any = trainer.strategy
        if trainer.global_step == 3:
            strategy.checkpoint_options.in_background = False
            trainer.save_checkpoint(self.folder / "now.ckpt")
            strategy.checkpoint_options.in_background = True
            start = strategy.parts.checkpoints.saves.start

            def late(path: Path, save: Any) -> None:
                def waiting(group: Any) -> None:
                    assert self.held.wait(60)
                    save(group)

                start(path, waiting)

            strategy.parts.checkpoints.saves.start = late
            trainer.save_checkpoint(self.folder / "later.ckpt")
            strategy.parts.checkpoints.saves.start = start
        if trainer.global_step == 5:
            self.while_held.append((self.folder / "later.ckpt").exists())
            self.held.set()


def _both(layout: str, folder: Path) -> list[bool]:
    L.seed_everything(1, verbose=False)
    both = Both(folder)
    plan = {"net.blocks.*.up": "colwise", "net.blocks.*.down": "rowwise"} if "tp" in layout else None
    strategy = HybridStrategy(layout, tensor_plan=plan)
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    trainer = L.Trainer(**QUIET, devices=world, strategy=strategy, max_steps=6, callbacks=[both])
    trainer.fit(models.Grouped(), DataLoader(samples(), batch_size=4))
    return both.while_held


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS)
def test_what_is_saved_beside_the_training_is_its_state_when_it_was_asked(
    layout: str, num_ranks: int, tmp_path: Path
) -> None:
    seen = [_both(layout, tmp_path)] if num_ranks == 1 else run_on_ranks(num_ranks, _both, layout, tmp_path)
    assert seen == [[False]] * num_ranks  # the training went on meanwhile
    now, later = (checkpoint.load(tmp_path / f"{name}.ckpt") for name in ("now", "later"))
    torch.testing.assert_close(later["state_dict"], now["state_dict"], rtol=0, atol=0)
    for state, expected in zip(later["optimizer_states"], now["optimizer_states"], strict=True):
        assert expected["state"]
        torch.testing.assert_close(state["state"], expected["state"], rtol=0, atol=0)
    assert later["loops"] == now["loops"]


def _single(path: Path) -> tuple[int, int, dict[str, Any], dict[str, Any]]:
    """Bytes that a save of a single file copied first, those of the buffers, what was to be saved, and what was."""
    module, saves, copied = build("shard"), BackgroundSaves(), list[int]()
    expected = {name: full(value).clone() for name, value in checkpoint.model_state(module).items()}
    copy = saves.memory.copy
    saves.memory.copy = lambda tensor: (copied.append(tensor.nbytes), copy(tensor))[1]  # type: ignore[method-assign]
    checkpoint.save({"state_dict": checkpoint.model_state(module)}, path, sharded=False, background=saves)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.zero_()
    saves.end()
    return sum(copied), sum(b.nbytes for b in module.buffers()), expected, torch.load(path)["state_dict"]


def test_a_copy_shares_nothing_that_can_change() -> None:
    shared, tensor, numbers = [1, {"a": 2}], torch.ones(3), tuple(range(700))
    tree: Any = {"one": shared, "two": (shared, tensor), "random": (3, numbers, None), 3: {"same": tensor}}
    tree |= {"ordered": OrderedDict(a=[1]), "odd keys": {(1, 2): [3]}, "users": Namespace(values=[4, tensor])}
    copied = HostMemory().snapshot(tree)
    shared[1]["a"], tree["ordered"]["a"][0], tree["odd keys"][1, 2][0], tree["users"].values[0] = 9, 9, 9, 9
    tensor.zero_()
    tree["new"] = None
    assert copied["one"] is copied["two"][0] == [1, {"a": 2}]
    assert copied["random"] == (3, numbers, None)
    assert copied["two"][1] is copied[3]["same"] is copied["users"].values[1]
    assert torch.equal(copied["two"][1], torch.ones(3))
    assert (copied["ordered"], copied["odd keys"]) == (OrderedDict(a=[1]), {(1, 2): [3]})
    assert copied["users"].values[0] == 4
    assert "new" not in copied


def test_what_was_gathered_for_a_file_is_not_copied_again(tmp_path: Path) -> None:
    (copied, of_buffers, expected, saved), _ = run_on_ranks(2, _single, tmp_path / "a.ckpt")
    assert all(torch.equal(saved[name], value) for name, value in expected.items())
    assert copied == of_buffers  # which each rank has whole: the training goes on with them


def _failing(rank: int, folder: Path) -> None:
    saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1, monitor="step", mode="max")

    class Break(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 4 and torch.distributed.get_rank() == rank:

                def no_space(system: Any, path: Any, *args: Any) -> Any:
                    if "step=3" in str(path):  # may be in flight still
                        return kept(system, path, *args)
                    raise OSError("no space left on device")

                ChecksumFileSystem.create_stream = no_space  # type: ignore[method-assign, assignment]

    kept = ChecksumFileSystem.create_stream
    strategy = HybridStrategy("dp_shard=2", async_save=True)
    try:
        trainer = L.Trainer(
            **{**QUIET, "enable_checkpointing": True},
            devices=2,
            strategy=strategy,
            max_steps=8,
            callbacks=[Break(), saves],
        )
        trainer.fit(models.Grouped(), DataLoader(samples(), batch_size=4))
    finally:
        ChecksumFileSystem.create_stream = kept  # type: ignore[method-assign]


def test_an_error_in_the_background_ends_all_ranks_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="no space left on device") as error:
        run_on_ranks(2, _failing, 1, tmp_path)
    assert "StoreRefused: the last checkpoint of this fit" in str(error.value)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=3.ckpt"]
    assert checkpoint.load(tmp_path / "step=3.ckpt")["global_step"] == 3


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_the_newest_complete_checkpoint_takes_the_place_of_a_damaged_last(kind: str, tmp_path: Path) -> None:
    saved_as = "sharded" if kind == "directory" else "single"
    run_on_ranks(2, _save_some, tmp_path, saved_as, None)
    last = tmp_path / "last.ckpt"
    damage(last / "__1_0.distcp" if kind == "directory" else last)
    with pytest.raises(checkpoint.DamagedCheckpoint, match="is damaged: its "):
        checkpoint.load(last)
    steps = run_on_ranks(2, _save_some, tmp_path, saved_as, "last")
    assert steps == [3, 3]


def _save_some(folder: Path, saved_as: Any, resume: Any) -> int:
    """The step from which it goes on."""
    first: list[int] = []

    class Note(Callback):
        def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
            first.append(trainer.global_step)

    saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    last = ModelCheckpoint(folder, filename="unused", every_n_train_steps=4, save_top_k=0, save_last=True)
    trainer = L.Trainer(
        **{**QUIET, "enable_checkpointing": True},
        devices=2,
        strategy=HybridStrategy("dp_shard=2", checkpoint_format=saved_as),
        max_steps=5,
        callbacks=[Note(), saves, last],
    )
    trainer.fit(models.Grouped(), DataLoader(samples(), batch_size=4), ckpt_path=resume)
    return first[0]


def test_links_to_what_is_not_there_yet_are_refused(tmp_path: Path) -> None:
    trainer = L.Trainer(
        **{**QUIET, "enable_checkpointing": True},
        devices=1,
        strategy=HybridStrategy("dp_shard=1", async_save=True),
        callbacks=[ModelCheckpoint(tmp_path, save_last="link")],
        max_steps=2,
    )
    with pytest.raises(ValueError, match=r'async_save=True with ModelCheckpoint\(save_last="link"\).*save_last=True'):
        trainer.fit(models.Classifier(), DataLoader(samples(), batch_size=4))
    assert list(tmp_path.iterdir()) == []


def test_a_removal_that_fails_after_a_save_is_a_warning(tmp_path: Path) -> None:
    saves = checkpoint.BackgroundSaves()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    for name in ("old", "new"):
        checkpoint.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / name, sharded=False, background=saves)
    saves.afterwards(lambda: checkpoint.remove(tmp_path / "notes"))
    saves.afterwards(lambda: checkpoint.remove(tmp_path / "old"))
    with pytest.warns(UserWarning, match="notes is no checkpoint, so it is not removed"):
        saves.end()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "notes"]


def test_the_saving_thread_is_on_the_device_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread begins on device 0, where a context takes memory."""
    indices: dict[int, int] = {}
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda i: indices.update({threading.get_ident(): i}))
    saves, ran = BackgroundSaves(), list[int]()
    saves.start(Path("anywhere"), lambda _: ran.append(indices[threading.get_ident()]))
    saves.wait()
    assert ran == [3]
