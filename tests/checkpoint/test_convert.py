"""A checkpoint in every form, from every other: what is read is what was written, and others open it."""

from __future__ import annotations

import multiprocessing
import resource
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_dist import checkpoint
from lightning_dist.checkpoint.lazy_tensors import bytes_of
from lightning_dist.checkpoint.sharded_load import Directory
from lightning_dist.checkpoint.streaming import open_checkpoint
from lightning_dist.cli import main
from tests.checkpoint.training import Net, assert_same, build, damage, make_optimizer, restore, snapshot, train
from tests.support.ranks import run_on_ranks


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one state as a file and as a directory that two ranks wrote, after 2 steps."""
    folder = tmp_path_factory.mktemp("trained")
    run_on_ranks(2, _train_and_save, folder)
    return folder


def _train_and_save(folder: Path) -> None:
    module = build("shard")
    optimizer = make_optimizer(module, "adamw")
    train(module, optimizer, range(2))
    checkpoint.save(snapshot(module, optimizer), folder / "directory.ckpt", sharded=True)
    checkpoint.save(snapshot(module, optimizer), folder / "file.ckpt", sharded=False)


@pytest.mark.parametrize("source", ["directory.ckpt", "file.ckpt"])
def test_forms_lead_into_each_other_and_nothing_is_lost(source: str, trained: Path, tmp_path: Path) -> None:
    expected = torch.load(trained / "file.ckpt", weights_only=True)
    checkpoint.convert(trained / source, tmp_path / "directory.ckpt", to="sharded")
    checkpoint.convert(tmp_path / "directory.ckpt", tmp_path / "file.ckpt", to="lightning")
    found = torch.load(tmp_path / "file.ckpt", weights_only=True)
    assert_same(found, expected)
    assert found["state_dict"]["head.weight"].data_ptr() == found["state_dict"]["embed.weight"].data_ptr()
    assert found["state_dict"]._metadata == expected["state_dict"]._metadata
    assert (tmp_path / "file.ckpt").stat().st_size == pytest.approx((trained / "file.ckpt").stat().st_size, rel=0.1)
    with zipfile.ZipFile(tmp_path / "file.ckpt") as archive:
        assert archive.testzip() is None
    for name in ("directory.ckpt", "file.ckpt"):
        losses = []
        for path in (trained / name, tmp_path / name):
            module = build("one", seed=1)
            optimizer = make_optimizer(module, "adamw")
            restore(path, module, optimizer)
            losses.append(train(module, optimizer, range(2, 4)))
        assert losses[0] == losses[1]


def test_what_was_converted_is_checked_like_any_other(trained: Path, tmp_path: Path) -> None:
    checkpoint.convert(trained / "directory.ckpt", tmp_path / "file.ckpt")
    damage(tmp_path / "file.ckpt")
    with pytest.raises(ValueError, match="fails its checksum"):
        checkpoint.load(tmp_path / "file.ckpt")
    checkpoint.convert(trained / "file.ckpt", tmp_path / "directory.ckpt", to="sharded")
    damage(tmp_path / "directory.ckpt" / "__0_0.distcp")
    with pytest.raises(ValueError, match=r"its part __0_0.distcp has"):
        checkpoint.convert(tmp_path / "directory.ckpt", tmp_path / "other.ckpt")
    assert not (tmp_path / "other.ckpt").exists()


def test_load_from_checkpoint_opens_what_was_sharded(trained: Path, tmp_path: Path) -> None:
    module = build("one")
    state = {**snapshot(module, make_optimizer(module, "adamw")), "hyper_parameters": dict(module.hparams)}
    checkpoint.save({**state, "pytorch-lightning_version": "2.6.6"}, tmp_path / "a.ckpt", sharded=True)
    checkpoint.convert(tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    assert_same(dict(Net.load_from_checkpoint(tmp_path / "b.ckpt").state_dict()), dict(module.state_dict()))


@pytest.mark.parametrize("source", ["directory.ckpt", "file.ckpt"])
def test_safetensors_hold_the_weights(source: str, trained: Path, tmp_path: Path) -> None:
    expected = dict(torch.load(trained / "file.ckpt")["state_dict"])
    checkpoint.convert(trained / source, tmp_path / "whole.safetensors", to="safetensors")
    module = build("one", seed=1)
    assert load_model(module, tmp_path / "whole.safetensors") == (set(), [])
    assert_same(dict(module.state_dict()), expected)
    assert_same(open_weights(tmp_path / "whole.safetensors"), dict(sorted(expected.items())))

    checkpoint.convert(trained / source, tmp_path / "parts", to="safetensors", largest_file=300)
    parts = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(parts) > 3
    assert all(part.name.endswith(f"-of-{len(parts):05}.safetensors") for part in parts)
    assert_same(open_weights(tmp_path / "parts"), dict(sorted(expected.items())))

    checkpoint.convert(trained / source, tmp_path / "norm.safetensors", to="safetensors", prefix="norm.")
    assert load_file(tmp_path / "norm.safetensors").keys() == torch.nn.BatchNorm1d(7).state_dict().keys()


def open_weights(path: Path) -> dict[str, Tensor]:
    return {name: lazy.read() for name, lazy in sorted(open_checkpoint(path)["state_dict"].items())}


KINDS = [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool]


def test_every_kind_and_form_of_tensor_comes_through(tmp_path: Path) -> None:
    weights = {str(kind): torch.randn(3, 5).abs().mul(9).to(kind) for kind in KINDS}
    base = torch.arange(24.0).reshape(4, 6)
    weights |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.5), "transposed": base.t(), "part": base[1:3, 2:5]}
    checkpoint.save({"state_dict": weights}, tmp_path / "file.ckpt", sharded=False)
    checkpoint.convert(tmp_path / "file.ckpt", tmp_path / "directory.ckpt", to="sharded")
    checkpoint.convert(tmp_path / "directory.ckpt", tmp_path / "again.ckpt")
    checkpoint.convert(tmp_path / "again.ckpt", tmp_path / "w.safetensors", to="safetensors")
    for found in (torch.load(tmp_path / "again.ckpt")["state_dict"], load_file(tmp_path / "w.safetensors")):
        assert found.keys() == weights.keys()
        for name, value in weights.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name].float(), value.float()), name


def test_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    base = torch.randn(40, 30)
    weights = {
        "matrix": base.clone(), "cube": torch.randn(7, 5, 3), "vector": torch.randn(11), "scalar": torch.tensor(2.5),
        "rows of a larger": base[3:21], "columns of a larger": base[:, 4:9], "every second": base[::2],
        "transposed": base.t(), "expanded": base[:1].expand(6, 30), "empty": torch.empty(0, 4),
    }  # fmt: skip
    run_on_ranks(2, _save_divided, base, tmp_path / "divided.ckpt")
    checkpoint.save({"state_dict": weights}, tmp_path / "file.ckpt", sharded=False)
    checkpoint.convert(tmp_path / "file.ckpt", tmp_path / "directory.ckpt", to="sharded")
    checkpoint.convert(tmp_path / "file.ckpt", tmp_path / "w.safetensors", to="safetensors")
    by_rows: dict[str, set[str]] = {}
    written = dict.fromkeys(("file.ckpt", "directory.ckpt", "w.safetensors"), weights)
    for name, expected in {"divided.ckpt": {"rows": base, "columns": base}, **written}.items():
        opened = open_checkpoint(tmp_path / name)["state_dict"]
        by_rows[name] = {key for key, lazy in opened.items() if lazy.read_rows is not None}
        for key, whole in expected.items():
            assert torch.equal(opened[key].read(), whole), (name, key)
            for largest in (1, 4 * 30 * 7, 1 << 20):
                pieces = [opened[key].read_some(begin, end) for begin, end in opened[key].rows(largest)]
                assert torch.equal(torch.cat(pieces) if whole.ndim else pieces[0], whole), (name, key, largest)
            assert b"".join(opened[key].pieces()) == bytes_of(whole).tobytes(), (name, key)
    assert by_rows["directory.ckpt"] == by_rows["w.safetensors"] == weights.keys() - {"scalar"}
    assert by_rows["file.ckpt"] == weights.keys() - {"scalar", "transposed", "expanded"}


def test_large_tensors_become_several_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("lightning_dist.checkpoint.streaming"), "_PART", 4 * 30 * 7)
    base = torch.randn(40, 30)
    weights = {"matrix": base, "tied": base, "vector": torch.randn(1000), "scalar": torch.tensor(2.5)}
    checkpoint.save({"state_dict": weights}, tmp_path / "file.ckpt", sharded=False)
    checkpoint.convert(tmp_path / "file.ckpt", tmp_path / "directory.ckpt", to="sharded")
    index = Directory.open(tmp_path / "directory.ckpt", True).index
    assert [len(index.state_dict_metadata[f"model.{name}"].chunks) for name in ("matrix", "vector")] == [6, 5]
    found = checkpoint.load(tmp_path / "directory.ckpt")["state_dict"]
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    checkpoint.convert(tmp_path / "directory.ckpt", tmp_path / "again.ckpt")
    again = torch.load(tmp_path / "again.ckpt")["state_dict"]
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_a_file_of_torchs_older_format_becomes_shards(tmp_path: Path) -> None:
    state = {"matrix": torch.randn(5, 3), "vector": torch.randn(4)}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "file.ckpt", _use_new_zipfile_serialization=False)
    checkpoint.convert(tmp_path / "file.ckpt", tmp_path / "directory.ckpt", to="sharded")
    assert_same(checkpoint.load(tmp_path / "directory.ckpt")["state_dict"], state)


def _save_divided(base: torch.Tensor, path: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    state = {"rows": distribute_tensor(base, mesh, [Shard(0)]), "columns": distribute_tensor(base, mesh, [Shard(1)])}
    checkpoint.save({"state_dict": state}, path, sharded=True)


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    sizes = [20_000_000, *[5_000_000] * 16]  # 400 MB, the largest tensor 80
    state = {f"w{number}": torch.randn(size) for number, size in enumerate(sizes)}
    checkpoint.save({"state_dict": state}, tmp_path / "a.ckpt", sharded=True)
    del state
    for to, name in [
        ("lightning", "b.ckpt"),
        ("sharded", "c.ckpt"),
        ("safetensors", "d"),
        ("safetensors", "e.safetensors"),
    ]:
        grown = _peak_of_conversion(tmp_path / "a.ckpt", tmp_path / name, to)
        assert grown < 80e6, f"{to}: {grown:,.0f} bytes"
    for source, name, to in [("b.ckpt", "f.ckpt", "sharded"), ("e.safetensors", "g.ckpt", "lightning")]:
        grown = _peak_of_conversion(tmp_path / source, tmp_path / name, to)
        assert grown < 80e6 + 50e6, f"{source} to {to}: {grown:,.0f} bytes"


def _peak_of_conversion(source: Path, target: Path, to: Any) -> float:
    """Bytes that a process needs beside what it has had before."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_convert_and_tell, args=(source, target, to, sender))
    process.start()
    sender.close()  # else a process that fails leaves this one waiting
    process.join()
    return float(receiver.recv())


def _convert_and_tell(source: Path, target: Path, to: Any, told: Any) -> None:
    before = _peak()
    checkpoint.convert(source, target, to=to)
    told.send(_peak() - before)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_command_converts_and_shows_a_bar(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = str(trained / "directory.ckpt"), str(tmp_path / "w.safetensors")
    assert main(["convert", source, target, "--to", "safetensors"]) == 0
    shown = capsys.readouterr().out
    assert "100%" in shown or "converted" in shown
    assert f"wrote {target}" in shown
    assert main(["convert", source, target, "--to", "safetensors"]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["convert", source, target, "--to", "safetensors", "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "onnx"}, "a checkpoint can't be written as 'onnx'"),
        ({"to": "transformers"}, "what configuration of transformers to write is not known.*pass config"),
        ({"to": "safetensors", "prefix": "model."}, "no weight of .* begins with 'model.'; it has scale"),
        ({"to": "sharded", "prefix": "model."}, "holds a run, whose names stay"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    arguments: dict[str, Any], message: str, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint.convert(trained / "file.ckpt", tmp_path / "target", **arguments)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="is the source"):
        checkpoint.convert(
            trained / "file.ckpt", trained / "file.ckpt", overwrite=True, **arguments | {"to": "sharded"}
        )
