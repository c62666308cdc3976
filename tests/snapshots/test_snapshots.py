"""A fit that ends somewhere goes on from the last snapshot as if it had never stopped."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_dist import HybridStrategy
from lightning_dist.checkpoint.slots import Slot, read_header
from lightning_dist.checkpoint.snapshot_state import PartOfState, Reference
from lightning_dist.pytree import map_leaves
from lightning_dist.trainer.snapshot_writer import SnapshotWriter
from tests.snapshots.training import Late, Leg, Net, Numbered, leg
from tests.support.parity import QUIET, slow
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled


def on(layout: str, directory: Path, *args: Any) -> list[Leg]:
    if "=2" not in layout:
        return [leg(layout, directory, *args)]
    return run_on_ranks(4 if "," in layout else 2, leg, layout, directory, *args)


def assert_goes_on(
    whole: list[Leg], ended: list[Leg], again: list[Leg], first: int, batches: int | None = None
) -> None:
    """The last leg began after so many steps, and all it did is what the whole run did from there."""
    for one, before, after in zip(whole, ended, again, strict=True):
        assert after.first == first
        done = first if batches is None else batches
        assert before.losses[:done] == one.losses[: min(done, len(before.losses))]
        assert after.seen == one.seen[done:]
        assert after.losses == one.losses[done:]
        assert after.steps == one.steps
        assert after.state.keys() == one.state.keys()
        for name, value in one.state.items():
            assert torch.equal(after.state[name], value), name
        if one.average is not None:
            assert torch.equal(after.average, one.average)


LAYOUTS = ["dp_shard=1", "dp_replicate=2", "dp_shard=2", "tp=2", "pp=2"]


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *map(slow, ["dp_shard=2,tp=2", "pp=2,dp_replicate=2", "dp_replicate=2,dp_shard=2"])]
)
@pytest.mark.parametrize("at", ["backward", *map(slow, ["batch", "step"])])
def test_a_fit_goes_on_from_its_last_step_to_the_bit(layout: str, at: str, tmp_path: Path) -> None:
    whole = on(layout, tmp_path / "whole")
    ended = on(layout, tmp_path / "run", 0, (at, 4))
    again = on(layout, tmp_path / "run", 1)
    assert len(ended[0].losses) == 4
    assert_goes_on(whole, ended, again, 4)


ENDS = {"epochs": {"max_epochs": 3}, "steps": {"max_epochs": -1, "max_steps": 18}}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    ("at", "steps", "first"), [("validation", 6, 5), ("epoch", 6, 5), ("batch", 6, 6), ("batch", 9, 9)]
)
def test_nothing_of_an_epochs_end_is_left_out(end: str, at: str, steps: int, first: int, tmp_path: Path) -> None:
    options = {"num_sanity_val_steps": 0, **ENDS[end]}
    whole = on("dp_shard=1", tmp_path / "whole", 0, (), options)
    ended = on("dp_shard=1", tmp_path / "run", 0, (at, steps), options)
    again = on("dp_shard=1", tmp_path / "run", 1, (), options)
    assert_goes_on(whole, ended, again, first)
    hooks = whole[0].hooks
    assert again[0].hooks[-3:] == hooks[-3:]
    assert [hook for hook in again[0].hooks if "validation" in hook] == [
        hook for hook in hooks if "validation" in hook and int(hook.split()[1]) > first
    ]


@pytest.mark.parametrize("validates", [True, False])
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("layout", ["dp_shard=1", "dp_shard=2", "dp_replicate=2"])
def test_it_goes_on_again_and_again(layout: str, ends: str, validates: bool, tmp_path: Path) -> None:
    options, end = {**ENDS[ends]}, 6 if layout == "dp_shard=1" else 3  # of the first epoch
    if not validates:
        options["limit_val_batches"] = 0
    whole = on(layout, tmp_path / "whole", 0, (), options)
    first = 0
    for number, step in enumerate([end - 1, end, end, end + 1, end + 2, 2 * end, 2 * end + 1]):
        for one, leg_of_it in zip(
            whole, on(layout, tmp_path / "run", number, ("backward", step), options), strict=True
        ):
            assert (leg_of_it.first, leg_of_it.seen) == (first, one.seen[first:step])
        first = step
    assert_goes_on(whole, whole, on(layout, tmp_path / "run", 7, (), options), first)


def slots(directory: Path, rank: int = 0) -> list[Path]:
    """A rank's two slots, the older first."""
    found = sorted(directory.glob(f"*/snapshots/*-{rank}.[01]"), key=lambda path: slots_order(path))
    assert len(found) == 2
    return found


def slots_order(path: Path) -> tuple[int, int]:
    header = read_header(path)
    assert header is not None
    return header.order


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        value = file.read(1)[0]
        file.seek(at)
        file.write(bytes([value ^ 4]))


@pytest.mark.parametrize("where", ["header", "tensors", "last word", "small"])
def test_a_changed_bit_is_found_and_the_snapshot_before_taken(where: str, tmp_path: Path) -> None:
    whole = on("dp_shard=1", tmp_path / "whole")
    ended = on("dp_shard=1", tmp_path / "run", 0, ("backward", 4))
    newest = slots(tmp_path / "run")[1]
    header = read_header(newest)
    assert header is not None
    at = {"header": 40, "tensors": 5000, "last word": 4096 + header.tensors - 64, "small": header.nbytes - 3}
    flip(newest, at[where])
    assert_goes_on(whole, ended, on("dp_shard=1", tmp_path / "run", 1), 3)


def test_what_a_callback_keeps_may_become_something_else() -> None:
    """From one snapshot to the next: a tensor, a container, a number, more tensors."""
    part, one = PartOfState(torch.nn.Linear(2, 2), (0, 1)), torch.ones(3)
    kept: list[Any] = [one, {"a": one, "b": [one + 1, 2]}, 5, [one, one + 2], one + 3, {"a": (one + 4, None)}]
    for value in kept:
        tensors, small = part.find({"callbacks": {"C": value}}, {"rank": 0})
        by_key = dict(zip([row.key for row in part.written], tensors, strict=True))
        rest = pickle.loads(small)["rest"]["callbacks"]["C"]
        assert str(map_leaves(rest, lambda _, x, of=by_key: of[x.key] if isinstance(x, Reference) else x)) == str(value)


@pytest.mark.parametrize("layout", ["dp_replicate=2", slow("dp_shard=2"), slow("pp=2")])
def test_a_snapshot_that_one_rank_lacks_is_not_taken(layout: str, tmp_path: Path) -> None:
    whole = on(layout, tmp_path / "whole")
    ended = on(layout, tmp_path / "run", 0, ("backward", 4))
    slots(tmp_path / "run", 1)[1].unlink()
    assert_goes_on(whole, ended, on(layout, tmp_path / "run", 1), 3)


def killed(directory: Path, moment: str) -> None:
    """A training that is killed in its fourth snapshot, before it is all copied, or before it is whole."""
    owner: Any = {"copy": SnapshotWriter, "commit": Slot}[moment]
    name = {"copy": "_copy", "commit": "commit"}[moment]
    original, calls = getattr(owner, name), itertools.count(1)

    def strike(self: Any, *args: Any) -> Any:
        if next(calls) == 4:
            if moment == "copy":
                rows, tensors, number = args
                original(self, rows[: len(rows) // 2], tensors[: len(rows) // 2], number)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args)

    setattr(owner, name, strike)
    leg("dp_shard=1", directory)


@pytest.mark.parametrize("moment", ["copy", "commit"])
def test_killed_while_it_is_written_the_one_before_is_taken(moment: str, tmp_path: Path) -> None:
    whole = on("dp_shard=1", tmp_path / "whole")
    process = multiprocessing.get_context("fork").Process(target=killed, args=(tmp_path / "run", moment))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert_goes_on(whole, whole, on("dp_shard=1", tmp_path / "run", 1), 3)


@pytest.mark.parametrize("layout", [slow("dp_shard=1"), slow("dp_shard=2")])
def test_beside_saves_in_the_background(layout: str, tmp_path: Path) -> None:
    def options(name: str) -> dict[str, Any]:
        saves = ModelCheckpoint(tmp_path / name, every_n_train_steps=1, save_top_k=1)
        return {"async_save": True, "enable_checkpointing": True, "callbacks": [saves]}

    whole = on(layout, tmp_path / "whole", 0, (), options("a"))
    ended = on(layout, tmp_path / "run", 0, ("backward", 4), options("b"))
    assert_goes_on(whole, ended, on(layout, tmp_path / "run", 1, (), options("b")), 4)


def test_damaged_everywhere_a_fit_begins_anew(tmp_path: Path) -> None:
    whole = on("dp_shard=1", tmp_path / "whole")
    on("dp_shard=1", tmp_path / "run", 0, ("backward", 4))
    for path in slots(tmp_path / "run"):
        flip(path, 4200)
    again = on("dp_shard=1", tmp_path / "run", 1)
    assert again[0].losses == whole[0].losses


class Other(Net):
    """Of the same parameters."""


def test_a_snapshot_of_another_module_is_not_taken(tmp_path: Path) -> None:
    on("dp_shard=1", tmp_path, 0, ("backward", 4))
    assert on("dp_shard=1", tmp_path, 1, (), {"module": Other})[0].first == 0


@pytest.mark.parametrize("layout", ["dp_shard=1", slow("dp_replicate=2")])
def test_gradients_that_add_up_are_taken_again(layout: str, tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 2, "batch_size": 2}
    whole = on(layout, tmp_path / "whole", 0, (), options)
    ended = on(layout, tmp_path / "run", 0, ("step", 2), options)
    again = on(layout, tmp_path / "run", 1, (), options)
    assert_goes_on(whole, ended, again, 2, 4)


def test_every_third_step(tmp_path: Path) -> None:
    options = {"snapshot_every_n_steps": 3, "max_epochs": 3}
    whole = on("dp_shard=1", tmp_path / "whole", 0, (), options)
    ended = on("dp_shard=1", tmp_path / "run", 0, ("backward", 5), options)
    again = on("dp_shard=1", tmp_path / "run", 1, ("backward", 8), options)
    assert again[0].first == 3
    assert again[0].losses == whole[0].losses[3:8]
    assert_goes_on(whole, ended, on("dp_shard=1", tmp_path / "run", 2, (), options), 6, 6)


@pytest.mark.parametrize(
    ("layout", "other", "batch_size"),
    [("dp_shard=2", "dp_shard=1", 4), ("dp_replicate=2", "dp_shard=1", 4), slow("pp=2", "dp_shard=1", 2),
     slow("dp_shard=2,tp=2", "dp_shard=2", 2), slow("tp=2", "pp=2", 2), slow("dp_shard=1", "dp_shard=2", 1)],
)  # fmt: skip
def test_other_ranks_go_on_from_it(layout: str, other: str, batch_size: int, tmp_path: Path) -> None:
    """Without dropout or noise the losses would be the same; here the samples are, and the state that was read."""
    options = {"norm": False, "batch_size": 2}
    ended = on(layout, tmp_path / "run", 0, ("backward", 4), options)
    again = on(other, tmp_path / "run", 1, (), {**options, "batch_size": batch_size})
    assert again[0].first == 4
    taken = [n for one in distinct(ended) for _, numbers in one.seen for n in numbers]
    rest = [n for one in distinct(again) for epoch, numbers in one.seen if epoch == 0 for n in numbers]
    assert sorted(taken + rest) == list(range(24))


def distinct(legs: list[Leg]) -> list[Leg]:
    """One of those ranks that saw the same samples."""
    return list({str(one.seen): one for one in legs}.values())


@pytest.mark.parametrize(
    ("layout", "module"),
    [("dp_shard=2", Late), slow("dp_shard=2", Net), slow("pp=2", Net), slow("dp_replicate=2,dp_shard=2", Late)],
)
def test_what_a_lost_node_had_comes_from_its_partner(layout: str, module: Any, tmp_path: Path) -> None:
    per_node, options = 1 if "," not in layout else 2, {"module": module}
    whole = on(layout, tmp_path / "whole", 0, (), options, per_node)
    ended = on(layout, tmp_path / "run", 0, ("backward", 4), options, per_node)
    shutil.rmtree(tmp_path / "run" / "node1")
    again = on(layout, tmp_path / "run", 1, ("backward", 5), options, per_node)
    assert [one.first for one in again] == [4] * len(again)
    for one, after in zip(whole, again, strict=True):
        assert after.losses == one.losses[4:5]
    shutil.rmtree(tmp_path / "run" / "node0")
    assert_goes_on(whole, ended, on(layout, tmp_path / "run", 2, (), options, per_node), 5)


def lose(directory: Path, *nodes: int) -> None:
    for node in nodes:
        shutil.rmtree(directory / f"node{node}")


def test_what_a_node_lost_together_with_its_partner_comes_from_another_replica(tmp_path: Path) -> None:
    """Rank 1 alone has no part left: its random numbers are others, its samples and the weights are not."""
    options = {"norm": False}
    whole = on("dp_replicate=2,dp_shard=2", tmp_path / "whole", 0, (), options, 1)
    on("dp_replicate=2,dp_shard=2", tmp_path / "run", 0, ("backward", 4), options, 1)
    lose(tmp_path / "run", 1, 2)
    again = on("dp_replicate=2,dp_shard=2", tmp_path / "run", 1, (), options, 1)
    for rank, (one, after) in enumerate(zip(whole, again, strict=True)):
        assert after.first == 4
        assert after.seen == one.seen[4:]
        assert (after.losses[0] == one.losses[4]) == (rank != 1)


def test_one_with_all_parts_is_taken_before_a_newer_that_replicas_have(tmp_path: Path) -> None:
    """To the bit: rank 1 was killed in its last snapshot, which rank 0 on another node has whole."""
    whole = on("dp_replicate=2", tmp_path / "whole", 0, (), {}, 1)
    ended = on("dp_replicate=2", tmp_path / "run", 0, ("backward", 4), {}, 1)
    for node in ("node0", "node1"):
        parts = (tmp_path / "run" / node / "snapshots").glob("*-1.[01]")
        max(parts, key=slots_order).unlink()
    assert_goes_on(whole, ended, on("dp_replicate=2", tmp_path / "run", 1, (), {}, 1), 3)


def test_what_no_replica_has_is_not_put_together(tmp_path: Path) -> None:
    on("dp_shard=2,tp=2", tmp_path, 0, ("backward", 4), {"norm": False}, 1)
    lose(tmp_path, 1, 2)
    again = on("dp_shard=2,tp=2", tmp_path, 1, ("backward", 2), {"norm": False}, 1)
    assert [one.first for one in again] == [0] * 4


class Placed(IterableDataset):
    """A stream whose place each rank keeps for itself."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Any:
        while self.at < 12:
            self.at += 1
            yield Numbered()[self.at]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def test_a_lost_place_of_a_loader_is_not_made_up(tmp_path: Path) -> None:
    options = {"norm": False, "data": Placed}
    on("dp_replicate=2,dp_shard=2", tmp_path, 0, ("backward", 4), options, 1)
    lose(tmp_path, 1, 2)
    again = on("dp_replicate=2,dp_shard=2", tmp_path, 1, ("backward", 2), options, 1)
    assert [one.first for one in again] == [0] * 4
    assert not list(tmp_path.glob("node*/snapshots/*-of-step-*"))  # nor is what was put together left in memory


def test_ranks_that_are_left_go_on_with_what_the_lost_node_had(tmp_path: Path) -> None:
    options = {"norm": False, "batch_size": 2}
    on("dp_shard=2", tmp_path, 0, ("backward", 4), options, 1)
    shutil.rmtree(tmp_path / "node1")
    assert on("dp_shard=1", tmp_path, 1, (), options, 1)[0].first == 4


def test_without_an_agent_nothing_is_taken_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    strategy = HybridStrategy(snapshot_every_n_steps=1)
    trainer = L.Trainer(**QUIET, devices=1, strategy=strategy, max_epochs=1)
    with caplog.at_level(logging.INFO):
        trainer.fit(Net(), DataLoader(Numbered(), batch_size=4))
    assert caplog.text.count("no snapshots are taken") == 1


@pytest.mark.parametrize("steps", [0, -1, True, 1.5, "1"])
def test_what_is_no_number_of_steps_is_refused(steps: Any) -> None:
    with pytest.raises(ValueError, match=f"snapshot_every_n_steps={steps!r} is no number of steps"):
        HybridStrategy(snapshot_every_n_steps=steps)


def test_without_room_the_training_goes_on(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", no_room)
    again = on("dp_shard=1", tmp_path, 0)
    assert again[0].steps == 12
    assert caplog.text.count("no more snapshots are taken") == 1
    assert not list(tmp_path.glob("*/snapshots/*"))


def test_a_fit_that_ended_leaves_its_last_snapshot_alone(tmp_path: Path) -> None:
    ended = on("dp_replicate=2", tmp_path)
    assert sorted(path.name[-3:-1] for path in tmp_path.glob("*/snapshots/*")) == ["0.", "1."]
    again = on("dp_replicate=2", tmp_path, 1)
    assert again[0].losses == []
    assert again[0].steps == ended[0].steps
