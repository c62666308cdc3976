"""Files of plain Lightning open here, and ours there."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from omegaconf import OmegaConf
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy, checkpoint
from lightning_dist.checkpoint import convert
from tests.checkpoint.training import Net, assert_same, batch, build, make_optimizer, restore, train
from tests.support.models import Words, words
from tests.support.parity import QUIET, Watch, slow, whole_weights
from tests.support.ranks import run_on_ranks


def trainer(folder: Path, epochs: int, **arguments: Any) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **{"strategy": SingleDeviceStrategy("cpu"), **arguments},
    )


def loader() -> DataLoader[Any]:
    return DataLoader([sample for step in range(2) for sample in batch(step)], batch_size=16)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of plain Lightning in one process, after 2 epochs of 2 steps."""
    folder = tmp_path_factory.mktemp("plain")
    run = trainer(folder, 2)
    run.fit(build("one"), loader())
    run.save_checkpoint(folder / "plain.ckpt")
    return folder / "plain.ckpt"


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "single"])
def test_state_that_came_through_shards_is_the_file_of_plain_lightning(
    sharded: bool, plain: Path, tmp_path: Path
) -> None:
    run_on_ranks(2, _through_shards, plain, tmp_path / "ours.ckpt", sharded)
    ours = tmp_path / "ours.ckpt"
    if sharded:
        checkpoint.convert(ours, tmp_path / "file.ckpt")
        ours = tmp_path / "file.ckpt"
    assert_same(torch.load(ours, weights_only=True), torch.load(plain, weights_only=True))
    weights = torch.load(ours, weights_only=True)["state_dict"]
    assert weights["head.weight"].data_ptr() == weights["embed.weight"].data_ptr(), "tied weights are stored once"
    assert weights._metadata == torch.load(plain, weights_only=True)["state_dict"]._metadata


def test_plain_trainer_resumes_from_our_file(plain: Path, tmp_path: Path) -> None:
    run_on_ranks(2, _through_shards, plain, tmp_path / "ours.ckpt", False)
    uninterrupted = build("one")
    trainer(tmp_path, 4).fit(uninterrupted, loader())
    resumed = build("one", seed=1)
    trainer(tmp_path, 4).fit(resumed, loader(), ckpt_path=tmp_path / "ours.ckpt")
    assert resumed.losses == uninterrupted.losses[4:]
    module = Net.load_from_checkpoint(tmp_path / "ours.ckpt")
    assert_same(dict(module.state_dict()), dict(torch.load(plain)["state_dict"]))


def test_directory_of_lightnings_model_parallel_strategy_loads(tmp_path: Path) -> None:
    results = run_on_ranks(2, _save_with_model_parallel, tmp_path / "theirs.ckpt")
    module = build("one", seed=1)
    optimizer = make_optimizer(module, "adamw")
    state = restore(tmp_path / "theirs.ckpt", module, optimizer)
    assert state["global_step"] == 2
    assert train(module, optimizer, range(2, 4)) == pytest.approx(results[0], abs=1e-6)


def test_hyper_parameters_in_omegaconf_load_without_trusting_the_file(tmp_path: Path) -> None:
    config = OmegaConf.create({"width": 7, "names": ["a", {"b": 1.5}], "twice": "${width}"})
    state = {"state_dict": build("one").state_dict(), "hyper_parameters": config, "hparams_type": type(config)}
    for name, sharded in (("single.ckpt", False), ("sharded.ckpt", True)):
        checkpoint.save(state, tmp_path / name, sharded=sharded)
        loaded = checkpoint.load(tmp_path / name)["hyper_parameters"]
        assert loaded == config
        assert loaded.twice == 7


def test_hook_may_rename_entries_between_reading_and_loading(tmp_path: Path) -> None:
    for sharded in (True, False):
        run_on_ranks(2, _rename, tmp_path / f"{sharded}.ckpt", sharded)


def _through_shards(source: Path, target: Path, sharded: bool) -> None:
    module = build("shard", seed=1)
    optimizer = make_optimizer(module, "adamw")
    state = restore(source, module, optimizer)
    state["state_dict"] = checkpoint.model_state(module)
    state["optimizer_states"] = [checkpoint.optimizer_state_by_name(optimizer, checkpoint.parameter_names(module))]
    checkpoint.save(state, target, sharded=sharded)


class Parallel(Net):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        fully_shard(self.hidden, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def configure_optimizers(self) -> Any:
        return make_optimizer(self, "adamw")


def _save_with_model_parallel(path: Path) -> list[float]:
    torch.manual_seed(0)
    module = Parallel()
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    run = trainer(path.parent, 1, strategy=strategy, devices=2, use_distributed_sampler=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, loader())
        run.save_checkpoint(path)
    run.optimizers[0].zero_grad()  # Lightning leaves the last step's gradients
    return train(module, run.optimizers[0], range(2, 4))


def _rename(path: Path, sharded: bool) -> None:
    module = build("shard")
    state = {f"old.{name}": value for name, value in checkpoint.model_state(module).items()}
    checkpoint.save({"state_dict": state}, path, sharded=sharded)
    other = build("shard", seed=1)
    loaded = checkpoint.load(path, other)["state_dict"]
    renamed = {name.removeprefix("old."): value for name, value in loaded.items()}
    assert checkpoint.load_model_state(other, renamed) == ([], [])
    assert torch.equal(other.hidden.weight.full_tensor(), module.hidden.weight.full_tensor())  # type: ignore[operator]


class TiedWords(Words):
    """With a tied head, a frozen part and a buffer."""

    def build(self) -> None:
        super().build()
        self.head.weight = self.embed.weight
        self.frozen = torch.nn.Linear(3, 3).requires_grad_(False)
        self.norm = torch.nn.BatchNorm1d(16)


def save_shards(layout: str, path: Path) -> Any:
    L.seed_everything(1, verbose=False)
    strategy = HybridStrategy(layout, checkpoint_format="sharded")
    trainer = L.Trainer(**QUIET, devices=dist.get_world_size(), strategy=strategy, max_epochs=1)
    ranks = strategy.ranks.requested.resolve(trainer.world_size).num_data_ranks  # type: ignore[union-attr]
    module = TiedWords()
    trainer.fit(module, DataLoader(words(), batch_size=8 // ranks))
    trainer.save_checkpoint(path)
    return whole_weights(module)


@pytest.mark.parametrize("layout", [slow("dp_replicate=2"), slow("dp_shard=2"), slow("tp=2"), slow("pp=2")])
def test_lightnings_own_consolidation_reads_our_directories(layout: str, tmp_path: Path) -> None:
    weights = run_on_ranks(2, save_shards, layout, tmp_path / "shards.ckpt")[0]
    command = "lightning.pytorch.utilities.consolidate_checkpoint"
    whole = tmp_path / "whole.ckpt"
    subprocess.run(
        [sys.executable, "-m", command, str(tmp_path / "shards.ckpt"), "--output_file", str(whole)],
        check=True,
        capture_output=True,
    )
    consolidated = torch.load(whole, weights_only=True)
    assert consolidated["state_dict"].keys() == weights.keys()
    torch.testing.assert_close(dict(consolidated["state_dict"]), weights)
    watches = []
    for name in ("whole", "converted"):
        if name == "converted":
            convert(tmp_path / "shards.ckpt", tmp_path / "converted.ckpt")
        watches.append(Watch())
        trainer = L.Trainer(**QUIET, devices=1, max_epochs=2, callbacks=[watches[-1]])
        L.seed_everything(2, verbose=False)
        trainer.fit(TiedWords(), DataLoader(words(), batch_size=8), ckpt_path=tmp_path / f"{name}.ckpt")
    assert len(watches[0].losses) == 6
    assert watches[0].losses == watches[1].losses


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp_shard=2", "pp=2"])
def test_what_lightning_consolidated_loads_here(layout: str, tmp_path: Path) -> None:
    run_on_ranks(2, save_shards, "dp_shard=2", tmp_path / "shards.ckpt")
    checkpoint_of = "lightning.pytorch.utilities.consolidate_checkpoint"
    arguments = [str(tmp_path / "shards.ckpt"), "--output_file", str(tmp_path / "whole.ckpt")]
    subprocess.run([sys.executable, "-m", checkpoint_of, *arguments], check=True, capture_output=True)
    losses = [run_on_ranks(2, go_on, layout, tmp_path / f"{name}.ckpt")[0] for name in ("whole", "shards")]
    assert len(losses[0]) == 6
    torch.testing.assert_close(losses[0], losses[1])


def go_on(layout: str, path: Path) -> list[float]:
    L.seed_everything(2, verbose=False)
    watch, strategy = Watch(), HybridStrategy(layout)
    trainer = L.Trainer(**QUIET, devices=2, strategy=strategy, max_epochs=2, callbacks=[watch])
    ranks = strategy.ranks.requested.resolve(2).num_data_ranks  # type: ignore[union-attr]
    trainer.fit(TiedWords(), DataLoader(words(), batch_size=8 // ranks), ckpt_path=path)
    return watch.losses
