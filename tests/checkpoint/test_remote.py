"""Checkpoints at URLs: in memory, for one process, and at a stand-in of an object store, for several."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from upath import UPath

from lightning_dist import HybridStrategy, checkpoint
from lightning_dist.checkpoint import locations
from tests.checkpoint.training import build, make_optimizer, restore, snapshot, train
from tests.support import models
from tests.support.models import samples
from tests.support.parity import QUIET
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

FORMS = pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])


@pytest.fixture
def memory() -> Iterator[str]:
    folder = f"memory://{uuid.uuid4().hex}"
    yield folder
    if UPath(folder).exists():
        UPath(folder).fs.rm(folder, recursive=True)


@pytest.fixture
def bucket(store: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in _access(store).items():
        monkeypatch.setenv(name, value)
    name = f"b{uuid.uuid4().hex}"
    UPath(f"s3://{name}").fs.mkdir(name)
    return f"s3://{name}"


def _access(store: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": store,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def _train(path: str | None, steps: range, end: str | None, sharded: bool) -> list[float]:
    module = build("one", seed=0 if path is None else 1)
    optimizer = make_optimizer(module, "adamw")
    if path is not None:
        restore(path, module, optimizer)
    losses = train(module, optimizer, steps)
    if end is not None:
        checkpoint.save(snapshot(module, optimizer), end, sharded=sharded)
    return losses


def _names(folder: str) -> list[str]:
    return sorted(file.name for file in locations.as_path(folder).iterdir())


@FORMS
@pytest.mark.parametrize("place", ["memory", "bucket"])
def test_a_run_goes_on_from_a_url(place: str, sharded: bool, request: pytest.FixtureRequest) -> None:
    path = f"{request.getfixturevalue(place)}/run/a.ckpt"
    uninterrupted = _train(None, range(6), None, sharded)
    _train(None, range(2), path, sharded)
    _train(None, range(4), path, sharded)  # in place of the first
    assert _names(path.rsplit("/", 1)[0]) == ["a.ckpt"]
    assert checkpoint.is_sharded(path) == sharded
    assert _train(path, range(4, 6), None, sharded) == uninterrupted[4:]
    checkpoint.remove(path)
    with pytest.raises(FileNotFoundError, match=r"not found: .*a\.ckpt"):
        checkpoint.load(path)


def _steps_of(path: str) -> float:
    module = build("one")
    state = checkpoint.load(path, module)["optimizer_states"][0]["state"]
    return float(next(iter(state.values()))["step"])


def test_a_replacement_leaves_one_of_both_wherever_it_is_ended(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, fs = f"{memory}/a.ckpt", type(UPath(memory).fs)
    held = []
    for last in itertools.count():  # of the changes to the store that are made
        if UPath(path).exists():
            checkpoint.remove(path)
        _train(None, range(2), path, True)
        with monkeypatch.context() as patched:
            left = [last]
            for name in ("_open", "rm_file", "rmdir", "cp_file"):
                patched.setattr(fs, name, _ending(getattr(fs, name), left))
            try:
                _train(None, range(4), path, True)
            except RuntimeError:
                ended = True
            else:
                ended = False
        held.append(_steps_of(path))
        if not ended:
            break
        _train(None, range(5), path, True)
        assert _steps_of(path) == 5
        assert _names(memory) == ["a.ckpt"]
    assert held == sorted(held)
    assert len(held) > 15
    assert {2, 4} == set(held)


def _ending(method: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    def change(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        if method.__name__ != "_open" or "rb" not in (*args, *kwargs.values()):
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("the process is gone")
        return method(self, path, *args, **kwargs)

    return change


def test_a_damaged_part_is_named(memory: str) -> None:
    path = f"{memory}/a.ckpt"
    _train(None, range(1), path, True)
    part = UPath(path) / "__0_0.distcp"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(bytes(content))
    with pytest.raises(checkpoint.DamagedCheckpoint, match=r"memory://.*a\.ckpt is damaged: its part __0_0\.distcp"):
        checkpoint.load(path)
    (UPath(path) / ".metadata").unlink()
    with pytest.raises(checkpoint.DamagedCheckpoint, match=r"has no \.metadata; its save did not finish"):
        checkpoint.load(path)


def test_what_is_read_through_a_copy_is_named_by_its_url(memory: str) -> None:
    path = f"{memory}/a.ckpt"
    UPath(path).write_bytes(b"nothing")
    with pytest.raises(checkpoint.DamagedCheckpoint, match=rf"^{path} is no checkpoint"):
        checkpoint.load(path)


def test_only_a_checkpoint_is_removed(memory: str) -> None:
    (UPath(memory) / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no checkpoint, so it is not removed"):
        checkpoint.remove(f"{memory}/notes")
    assert _names(memory) == ["notes"]


def test_an_unknown_protocol_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nosuch://bucket/a\.ckpt can't be opened"):
        checkpoint.load("nosuch://bucket/a.ckpt")
    _train(None, range(1), f"file://{tmp_path}/a.ckpt", False)
    assert (tmp_path / "a.ckpt").is_file()


@pytest.mark.parametrize("place", ["memory", "bucket"])
def test_convert_reads_and_writes_urls(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(place)
    _train(None, range(2), f"{folder}/a.ckpt", True)
    expected = {name: value.clone() for name, value in checkpoint.load(f"{folder}/a.ckpt")["state_dict"].items()}
    steps: list[tuple[str, str, Any]] = [
        ("a.ckpt", "b.ckpt", "lightning"),
        ("b.ckpt", "c.ckpt", "sharded"),
        ("c.ckpt", "d.safetensors", "safetensors"),
        ("d.safetensors", "e", "safetensors"),
        ("e", "f.ckpt", "lightning"),
    ]
    for source, target, to in steps:
        assert str(checkpoint.convert(f"{folder}/{source}", f"{folder}/{target}", to=to)) == f"{folder}/{target}"
        found = checkpoint.load(f"{folder}/{target}")["state_dict"]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        with pytest.raises(ValueError, match="exists; pass another name"):
            checkpoint.convert(f"{folder}/{source}", f"{folder}/{target}", to=to)
    checkpoint.convert(f"{folder}/c.ckpt", tmp_path / "here.safetensors", to="safetensors")
    assert torch.equal(load_file(tmp_path / "here.safetensors")["hidden.weight"], expected["hidden.weight"])
    assert _names(folder) == ["a.ckpt", "b.ckpt", "c.ckpt", "d.safetensors", "e", "f.ckpt"]


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


def _fit(
    folder: str, layout: str, steps: int, ckpt_path: str | None = None, store: str | None = None, **strategy: Any
) -> tuple[list[float], str]:
    if store is not None:
        os.environ.update(_access(store))
    L.seed_everything(1, verbose=False)
    losses = Losses()
    saves = ModelCheckpoint(dirpath=folder, every_n_train_steps=2, save_top_k=1, save_last=True, filename="{step}")
    trainer = L.Trainer(
        **{**QUIET, "enable_checkpointing": True},
        devices=torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
        strategy=HybridStrategy(layout, **strategy),
        max_steps=steps,
        callbacks=[losses, saves],
    )
    trainer.fit(models.Classifier(), DataLoader(samples(), batch_size=4), ckpt_path=ckpt_path)
    return losses.values, saves.last_model_path


@FORMS
def test_model_checkpoint_keeps_its_best_and_last_at_a_url(sharded: bool, memory: str) -> None:
    form: Any = "sharded" if sharded else "single"
    uninterrupted, _ = _fit(f"{memory}/whole", "dp_shard=1", 8, checkpoint_format=form)
    _, last = _fit(f"{memory}/run", "dp_shard=1", 4, checkpoint_format=form, async_save=True)
    assert _names(f"{memory}/run") == ["last.ckpt", "step=4.ckpt"]
    assert last == f"{memory}/run/last.ckpt"
    continued, _ = _fit(f"{memory}/run", "dp_shard=1", 8, ckpt_path=last, checkpoint_format=form)
    assert continued == uninterrupted[4:]
    assert _names(f"{memory}/run") == ["last.ckpt", "step=8.ckpt"]


def test_a_run_that_begins_anew_beside_a_last_checkpoint_says_so(memory: str) -> None:
    _fit(memory, "dp_shard=1", 2)
    with pytest.warns(UserWarning, match=r"begins anew, and memory://.*last\.ckpt is there"):
        _fit(memory, "dp_shard=1", 2, ckpt_path="last")


def test_a_fit_begins_from_weights_at_a_url(memory: str) -> None:
    _fit(memory, "dp_shard=1", 2)
    first, _ = _fit(f"{memory}/more", "dp_shard=1", 4, pretrained=f"{memory}/last.ckpt")
    fresh, _ = _fit(f"{memory}/fresh", "dp_shard=1", 4)
    assert first[0] != fresh[0]
    with pytest.raises(FileNotFoundError, match="Checkpoint file not found"):
        _fit(memory, "dp_shard=1", 1, pretrained=f"{memory}/none.ckpt")


@pytest.mark.slow
def test_ranks_share_a_checkpoint_at_a_store(bucket: str, store: str) -> None:
    def run(folder: str, steps: int, ckpt_path: str | None = None, **arguments: Any) -> Any:
        return run_on_ranks(2, _fit_with, f"{bucket}/{folder}", "dp_shard=2", steps, ckpt_path, store, arguments)

    uninterrupted = run("whole", 8)
    saved = run("run", 4, async_save=True)
    assert _names(f"{bucket}/run") == ["last.ckpt", "step=4.ckpt"]
    last = saved[0][1]
    assert {"__0_0.distcp", "__1_0.distcp"} <= set(_names(last))
    resumed = run("run", 8, last, async_save=True)
    assert [losses for losses, _ in resumed] == [losses[4:] for losses, _ in uninterrupted]
    weights, others = (checkpoint.load(f"{bucket}/{run}/step=8.ckpt")["state_dict"] for run in ("whole", "run"))
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def _fit_with(
    folder: str, layout: str, steps: int, ckpt_path: str | None, store: str, arguments: dict[str, Any]
) -> Any:
    return _fit(folder, layout, steps, ckpt_path, store, **arguments)


@FORMS
def test_a_folder_of_other_things_at_a_url_is_not_replaced(sharded: bool, memory: str) -> None:
    _train(None, range(1), f"{memory}/run/a.ckpt", True)
    with pytest.raises(ValueError, match=r"run is a directory that holds a\.ckpt"):
        _train(None, range(1), f"{memory}/run", sharded)
    assert _names(f"{memory}/run") == ["a.ckpt"]


def test_a_single_file_that_is_not_sent_leaves_the_shards(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{memory}/a.ckpt"
    _train(None, range(2), path, True)
    with monkeypatch.context() as patched:
        patched.setattr(type(UPath(path).fs), "put_file", _no_network)
        with pytest.raises(OSError, match="no network"):
            _train(None, range(4), path, False)
    assert _steps_of(path) == 2
    _train(None, range(4), path, False)
    assert not checkpoint.is_sharded(path)
    assert _steps_of(path) == 4
    assert _names(memory) == ["a.ckpt"]


def _no_network(*_: Any, **__: Any) -> None:
    raise OSError("no network")
