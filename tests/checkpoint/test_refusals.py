"""What is no checkpoint, a damaged one, or one of something else: one clear error, the same on every rank."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from lightning_dist import checkpoint
from lightning_dist.checkpoint import sharded_load, sharded_save
from tests.checkpoint.training import build, damage, make_optimizer, restore, snapshot
from tests.support.ranks import run_on_ranks


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def _state() -> dict[str, Any]:
    module = build("one")
    return snapshot(module, make_optimizer(module, "adamw"))


def _file(path: Path) -> None:
    checkpoint.save(_state(), path, sharded=False)


def _directory(path: Path) -> None:
    checkpoint.save(_state(), path, sharded=True)


def _random_file(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 8)


def _empty_file(path: Path) -> None:
    path.touch()


def _truncated_file(path: Path) -> None:
    _file(path)
    path.write_bytes(path.read_bytes()[:-200])


def _no_weights(path: Path) -> None:
    torch.save({"epoch": 1, "numbers": [1.0, 2.0]}, path)


def _foreign_directory(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("none")


def _without(name: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        _directory(path)
        (path / name).unlink()

    return make


def _truncated_part(path: Path) -> None:
    _directory(path)
    part = path / "__0_0.distcp"
    part.write_bytes(part.read_bytes()[:-200])


def _damaged_index(path: Path) -> None:
    _directory(path)
    (path / ".metadata").write_bytes(b"\x80\x04nonsense")


def _foreign_index(path: Path) -> None:
    _damaged_index(path)
    (path / "checksums.json").unlink()


def _damaged_tensors(path: Path) -> None:
    _directory(path)
    part = path / "__0_0.distcp"
    part.write_bytes(bytes(part.stat().st_size))


def _damaged_rest(path: Path) -> None:
    _directory(path)
    with (path / "meta.pt").open("ab") as file:
        file.write(b"x")


def _damaged_file(path: Path) -> None:
    _file(path)
    damage(path)


def _damaged_checksums(path: Path) -> None:
    _directory(path)
    (path / "checksums.json").write_text("[]")


def _newer(path: Path) -> None:
    _directory(path)
    rest = torch.load(path / "meta.pt")
    rest[sharded_save.MARKER]["format"] = 99
    torch.save(rest, path / "meta.pt")
    (path / "checksums.json").unlink()


def _changed_index(change: Callable[[Any], None]) -> Callable[[Path], None]:
    """What someone wrote who knows the format, and took the checksums away."""

    def make(path: Path) -> None:
        _directory(path)
        index = pickle.loads((path / ".metadata").read_bytes())
        change(index)
        (path / ".metadata").write_bytes(pickle.dumps(index))
        (path / "checksums.json").unlink()

    return make


def _huge(index: Any) -> None:
    stored = index.state_dict_metadata["model.scale"]
    stored.size = torch.Size([1 << 50])


def _huge_part(index: Any) -> None:
    stored = index.state_dict_metadata["model.scale"]
    stored.size = torch.Size([1 << 50])
    stored.chunks = [ChunkStorageMetadata(stored.chunks[0].offsets, stored.size)]


def _same_bytes_many_times(index: Any) -> None:
    embed, hidden = (_place(index, f"model.{name}.weight") for name in ("embed", "hidden"))
    index.storage_data[hidden] = index.storage_data[embed]


def _outside(index: Any) -> None:
    place = _place(index, "model.scale")
    index.storage_data[place] = replace(index.storage_data[place], relative_path="../../secret")


def _place(index: Any, name: str) -> Any:
    return next(place for place in index.storage_data if place.fqn == name)


def _repeated(path: Path) -> None:
    torch.save({"state_dict": {}, "callbacks": {"x": torch.zeros(1).expand(1 << 50)}}, path)


def _repeated_in_rest(path: Path) -> None:
    checkpoint.save({**_state(), "callbacks": {"x": torch.zeros(1).expand(1 << 50)}}, path, sharded=True)


def _compressed(path: Path) -> None:
    _file(path)
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "random file": (_random_file, "is no checkpoint, or a damaged one"),
    "empty file": (_empty_file, "is no checkpoint, or a damaged one"),
    "truncated file": (_truncated_file, "is no checkpoint, or a damaged one"),
    "no weights": (_no_weights, "no 'state_dict' and no bare weights"),
    "foreign directory": (_foreign_directory, "is a directory, but no checkpoint"),
    "no index": (_without(".metadata"), "is incomplete: it has no .metadata"),
    "no rest": (_without("meta.pt"), "is incomplete: it has no meta.pt"),
    "no part": (_without("__0_0.distcp"), "its part __0_0.distcp is missing"),
    "truncated part": (_truncated_part, "is damaged: its part __0_0.distcp has"),
    "damaged index": (_damaged_index, "is damaged: its part .metadata has 10 bytes"),
    "an index of nobody's": (_foreign_index, "is damaged: .metadata can't be read"),
    "damaged tensors": (_damaged_tensors, "is damaged: its part __0_0.distcp has"),
    "damaged rest": (_damaged_rest, "is damaged: its part meta.pt has"),
    "damaged file": (_damaged_file, "is damaged: its record"),
    "damaged checksums": (_damaged_checksums, "is damaged: checksums.json can't be read"),
    "newer format": (_newer, "has format 99"),
    "huge tensor": (_changed_index(_huge), "says that 'model.scale' has shape (1125899906842624,)"),
    "huge part": (_changed_index(_huge_part), "'model.scale', (1125899906842624,) at (0,), that its files do not"),
    "same bytes many times": (_changed_index(_same_bytes_many_times), "names bytes of __0_0.distcp twice"),
    "part outside": (_changed_index(_outside), "refers to '../../secret', outside its directory"),
    "repeated value": (_repeated, "'callbacks.x' has shape (1125899906842624,)"),
    "repeated value in the rest": (_repeated_in_rest, "'callbacks.x' has shape (1125899906842624,)"),
    "compressed": (_compressed, "is compressed"),
}


@pytest.mark.parametrize("case", CASES)
def test_unreadable_checkpoint_is_named(case: str, tmp_path: Path) -> None:
    make, message = CASES[case]
    path = tmp_path / "a.ckpt"
    make(path)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        checkpoint.load(path, build("one"))
    assert str(path) in str(error.value)


def test_what_one_rank_can_not_read_is_refused_on_all(tmp_path: Path) -> None:
    for name, make in (("file", _truncated_file), ("directory", _truncated_part), ("other", _foreign_directory)):
        make(tmp_path / name)
        messages = run_on_ranks(2, _load_error, tmp_path / name)
        assert messages[0] == messages[1]
        assert str(tmp_path / name) in messages[0]
    _directory(tmp_path / "good")
    first, second = run_on_ranks(2, _load_error_on_rank_1, tmp_path / "good")
    assert first == second == "the disk of rank 1"


def test_missing_path_is_a_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Checkpoint file not found: .*gone.ckpt"):
        checkpoint.load(tmp_path / "gone.ckpt")


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "single"])
def test_other_architecture_is_refused_with_names_and_both_shapes(sharded: bool, tmp_path: Path) -> None:
    checkpoint.save(_state(), tmp_path / "a.ckpt", sharded=sharded)
    for message in run_on_ranks(2, _fit_error, tmp_path / "a.ckpt"):
        assert str(tmp_path / "a.ckpt") in message
        assert re.search(r"hidden.weight.*\[7, 6\].*\[9, 6\]", message)


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "single"])
def test_missing_and_unexpected_names_are_refused_only_under_strict(sharded: bool, tmp_path: Path) -> None:
    state = _state()
    state["state_dict"]["surplus"] = torch.ones(2)
    del state["state_dict"]["scale"]
    checkpoint.save(state, tmp_path / "a.ckpt", sharded=sharded)
    assert run_on_ranks(2, _load_loosely, tmp_path / "a.ckpt") == [(["scale"], ["surplus"])] * 2


def test_optimizer_of_other_parameters_is_refused_by_name(tmp_path: Path) -> None:
    _directory(tmp_path / "a.ckpt")
    module = build("one")
    module.unused.requires_grad_(False)
    with pytest.raises(ValueError, match=r"group 0.*only saved: 'unused.weight'; only in the optimizer: none"):
        restore(tmp_path / "a.ckpt", module, make_optimizer(module, "adamw"))
    _file(tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="has 4 parameters in group 0, the optimizer 3"):
        restore(tmp_path / "b.ckpt", module, make_optimizer(module, "adamw"))
    with pytest.raises(ValueError, match="has 2 parameter groups, the optimizer 1"):
        restore(tmp_path / "b.ckpt", module, torch.optim.AdamW(module.parameters()))


def test_code_in_a_checkpoint_does_not_run_unless_the_file_is_trusted(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    for name, sharded in (("single.ckpt", False), ("sharded.ckpt", True)):
        checkpoint.save({**_state(), "callbacks": Bomb(proof)}, tmp_path / name, sharded=sharded)
        for weights_only in (None, True):
            with pytest.raises(ValueError, match=r"posix.mkdir.*weights_only=False"):
                checkpoint.load(tmp_path / name, weights_only=weights_only)
        assert not proof.exists()
        checkpoint.load(tmp_path / name, weights_only=False)
        proof.rmdir()
    _directory(tmp_path / "index.ckpt")
    (tmp_path / "index.ckpt" / ".metadata").write_bytes(pickle.dumps(Bomb(proof)))
    (tmp_path / "index.ckpt" / "checksums.json").unlink()
    with pytest.raises(ValueError, match=r"names posix.mkdir"):
        checkpoint.load(tmp_path / "index.ckpt", weights_only=False)
    assert not proof.exists()


@pytest.mark.parametrize("previous", ["file", "directory", "link"])
def test_failed_save_leaves_the_previous_checkpoint_and_a_good_one_replaces_it(previous: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    target = tmp_path / "target.ckpt" if previous == "link" else path
    (_file if previous == "file" else _directory)(target)
    if previous == "link":
        path.symlink_to(target.name)
    for message in run_on_ranks(2, _save_with_a_full_disk, path):
        assert str(path) in message
        assert "rank 1 met OSError: no space" in message
    assert checkpoint.load(path)["epoch"] == 1
    assert not list(tmp_path.glob(".*"))
    for sharded in (True, False):
        checkpoint.save({**_state(), "epoch": 5}, path, sharded=sharded)
        assert checkpoint.is_sharded(path) == sharded
        assert checkpoint.load(path)["epoch"] == 5
    assert checkpoint.load(target)["epoch"] == (1 if previous == "link" else 5)
    assert not list(tmp_path.glob(".*"))


def test_remove_takes_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    _file(tmp_path / "file.ckpt")
    _directory(tmp_path / "directory.ckpt")
    (tmp_path / "last.ckpt").symlink_to("directory.ckpt")
    checkpoint.remove(tmp_path / "last.ckpt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["directory.ckpt", "file.ckpt"]
    checkpoint.remove(tmp_path / "file.ckpt")
    checkpoint.remove(tmp_path / "directory.ckpt")
    checkpoint.remove(tmp_path / "gone.ckpt")
    assert not list(tmp_path.iterdir())
    _foreign_directory(tmp_path / "notes")
    with pytest.raises(ValueError, match="is no checkpoint, so it is not removed"):
        checkpoint.remove(tmp_path / "notes")


def test_convert_refuses_what_it_can_not_or_should_not_write(tmp_path: Path) -> None:
    _file(tmp_path / "file.ckpt")
    _directory(tmp_path / "directory.ckpt")
    with pytest.raises(ValueError, match="exists"):
        checkpoint.convert(tmp_path / "directory.ckpt", tmp_path / "file.ckpt")
    with pytest.raises(FileNotFoundError, match="gone"):
        checkpoint.convert(tmp_path / "gone.ckpt", tmp_path / "other.ckpt")
    checkpoint.convert(tmp_path / "directory.ckpt", tmp_path / "file.ckpt", overwrite=True)


def _load_error(path: Path) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        checkpoint.load(path, build("shard"))
    return str(error.value)


def _load_error_on_rank_1(path: Path) -> str:
    real = sharded_load.read_into_targets

    def read(*args: Any) -> None:
        if torch.distributed.get_rank() == 1:
            raise OSError("the disk of rank 1")
        real(*args)

    sharded_load.read_into_targets = read
    try:
        with pytest.raises(OSError, match="disk") as error:
            checkpoint.load(path, build("shard"))
    finally:
        sharded_load.read_into_targets = real
    return str(error.value)


def _fit_error(path: Path) -> str:
    module = build("shard", width=9)
    with pytest.raises(ValueError, match="does not fit Net") as error:
        restore(path, module, make_optimizer(module, "adamw"))
    return str(error.value)


def _load_loosely(path: Path) -> tuple[list[str], list[str]]:
    module = build("shard", seed=1)
    state = checkpoint.load(path, module)["state_dict"]
    with pytest.raises(ValueError, match=r'(?s)"scale".*"surplus"|"surplus".*"scale"'):
        checkpoint.load_model_state(module, state)
    return checkpoint.load_model_state(module, state, strict=False)


def _save_with_a_full_disk(path: Path) -> str:
    real = FileSystemWriter.write_data

    def write(self: Any, *args: Any) -> Any:
        if torch.distributed.get_rank() == 1:
            raise OSError("no space left on device")
        return real(self, *args)

    module = build("shard")
    FileSystemWriter.write_data = write  # type: ignore[method-assign]
    try:
        with pytest.raises(RuntimeError, match="could not write") as error:
            checkpoint.save(snapshot(module, make_optimizer(module, "adamw")), path, sharded=True)
    finally:
        FileSystemWriter.write_data = real  # type: ignore[method-assign]
    return str(error.value)


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_a_directory_of_other_things_is_not_replaced(sharded: bool, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    _file(runs / "good.ckpt")
    with pytest.raises(ValueError, match=r"runs is a directory that holds good\.ckpt"):
        checkpoint.save(_state(), runs, sharded=sharded)
    with pytest.raises(ValueError, match=r"runs is a directory that the source lies in"):
        checkpoint.convert(runs / "good.ckpt", runs, to="safetensors", overwrite=True)
    _file(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"runs is a directory that holds good\.ckpt"):
        checkpoint.convert(tmp_path / "a.ckpt", runs, to="sharded", overwrite=True)
    assert os.listdir(runs) == ["good.ckpt"]
    checkpoint.load(runs / "good.ckpt")


@pytest.mark.parametrize(
    ("name", "write"), [("a.ckpt", _file), ("a.ckpt/meta.pt", _directory), ("a.ckpt/.metadata", _directory)]
)
def test_a_flipped_bit_anywhere_is_damage_or_changes_nothing(name: str, write: Any, tmp_path: Path) -> None:
    write(tmp_path / "a.ckpt")
    wanted = checkpoint.load(tmp_path / "a.ckpt")["state_dict"]
    wanted = {key: value.clone() for key, value in wanted.items()}
    whole = (tmp_path / name).read_bytes()
    refused = 0
    for position in range(0, len(whole), max(1, len(whole) // 150)):
        content = bytearray(whole)
        content[position] ^= 1 << position % 8
        (tmp_path / name).write_bytes(bytes(content))
        try:
            found = checkpoint.load(tmp_path / "a.ckpt")["state_dict"]
        except checkpoint.DamagedCheckpoint:
            refused += 1
        else:
            assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert refused > 100 or name == "a.ckpt"


def test_a_directory_that_lost_its_checksums_is_refused(tmp_path: Path) -> None:
    _directory(tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt" / "checksums.json").unlink()
    with pytest.raises(checkpoint.DamagedCheckpoint, match=r"has no checksums\.json; its save did not finish"):
        checkpoint.load(tmp_path / "a.ckpt")


def test_compressed_records_of_a_directory_are_refused(tmp_path: Path) -> None:
    _directory(tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt" / "checksums.json").unlink()
    meta = tmp_path / "a.ckpt" / "meta.pt"
    with zipfile.ZipFile(meta) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(meta, "w", zipfile.ZIP_DEFLATED) as archive:
        for record, content in records.items():
            archive.writestr(record, content)
    with pytest.raises(checkpoint.DamagedCheckpoint, match="is compressed"):
        checkpoint.load(tmp_path / "a.ckpt")


def test_only_leftovers_of_checkpoints_are_cleared_away(tmp_path: Path) -> None:
    _directory(tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt").rename(tmp_path / ".b.ckpt.removed")
    (tmp_path / ".mine.removed").mkdir()
    (tmp_path / ".mine.removed" / "notes.txt").touch()
    _file(tmp_path / "c.ckpt")
    checkpoint.remove(tmp_path / "c.ckpt")
    assert os.listdir(tmp_path) == [".mine.removed"]


def test_data_is_not_replaced_and_a_checkpoint_with_hidden_files_is(tmp_path: Path) -> None:
    data = tmp_path / "shakespeare"
    data.mkdir()
    for name in ("train.bin", "meta.json", "README.md"):
        (data / name).touch()
    with pytest.raises(ValueError, match="shakespeare is a directory that holds"):
        checkpoint.save(_state(), data, sharded=False)
    assert len(os.listdir(data)) == 3
    _directory(tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt" / ".DS_Store").touch()
    _directory(tmp_path / "a.ckpt")
    published = tmp_path / "published"
    (published / ".cache").mkdir(parents=True)
    for name in (".gitattributes", "config.json", "modeling_mine.py", "optimizer.pt"):
        (published / name).touch()
    checkpoint.convert(tmp_path / "a.ckpt", published / "model.safetensors", to="safetensors")
    checkpoint.convert(tmp_path / "a.ckpt", published, to="safetensors", overwrite=True)
    assert os.listdir(published) == ["model.safetensors"]


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError("not yours")

    _file(tmp_path / "a.ckpt")
    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", refused)
        with pytest.raises(PermissionError, match="not yours"):
            checkpoint.load(tmp_path / "a.ckpt")
    _directory(tmp_path / "b.ckpt")
    with monkeypatch.context() as patched:
        patched.setattr("torch.distributed.checkpoint.FileSystemReader.read_data", refused)
        with pytest.raises(PermissionError, match="not yours"):
            checkpoint.load(tmp_path / "b.ckpt")
