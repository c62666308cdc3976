"""A checkpoint of one layout continues under another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from lightning_dist import checkpoint
from lightning_dist.checkpoint.optimizer_state import with_indices
from lightning_dist.checkpoint.sharded_load import Directory
from lightning_dist.pytree import map_leaves
from tests.checkpoint.training import (
    OPTIMIZERS,
    RANKS,
    assert_same,
    build,
    leg,
    make_optimizer,
    restore,
    snapshot,
    train,
)
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

LONG = [("shard", True), ("one", False), ("hybrid", True), ("replicate", True), ("shard", False)]
"""Layouts a run goes through, and whether the checkpoint at the end of each is sharded."""

SHORT = [("shard", True), ("one", False), ("shard", True)]
JOURNEYS = {name: LONG if name in ("adamw", "momentum") else SHORT for name in OPTIMIZERS}


def on(layout: str, function: Any, *args: Any) -> list[Any]:
    """In this process, without a process group, where the layout is one process."""
    return [function(*args)] if layout == "one" else run_on_ranks(RANKS[layout], function, *args)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_run_that_changes_layout_continues_as_if_uninterrupted(optimizer: str, tmp_path: Path) -> None:
    journey = JOURNEYS[optimizer]
    losses: list[float] = []
    start = None
    for number, (layout, sharded) in enumerate(journey):
        end = tmp_path / f"{number}.ckpt"
        steps = range(2 * number, 2 * number + 2)
        losses += on(layout, leg, layout, optimizer, steps, start, end, sharded)[0]
        start = end
    steps = range(2 * len(journey))
    expected = leg("one", optimizer, steps, None, tmp_path / "expected.ckpt", False)
    assert losses == pytest.approx(expected, abs=1e-6)
    assert_same(_full_state(end), _full_state(tmp_path / "expected.ckpt"), atol=1e-6)


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "single"])
@pytest.mark.parametrize("layout", ["one", "replicate", "shard", "hybrid"])
def test_state_is_bitwise_the_same_under_the_same_layout(layout: str, sharded: bool, tmp_path: Path) -> None:
    assert all(on(layout, _roundtrip, layout, tmp_path / "a.ckpt", sharded))


def test_states_of_another_shape_than_their_parameter_are_whole_on_every_rank(tmp_path: Path) -> None:
    run_on_ranks(2, _factored, tmp_path / "a.ckpt")


def test_plain_state_of_a_sharded_parameter_is_refused() -> None:
    for message in run_on_ranks(2, _plain_state):
        assert "'history' of the sharded parameter 'hidden.weight'" in message


def test_optimizer_without_a_step_has_no_state_after_loading(tmp_path: Path) -> None:
    run_on_ranks(2, leg, "shard", "adamw", range(0), None, tmp_path / "a.ckpt", True)
    module = build("one")
    optimizer = make_optimizer(module, "adamw")
    restore(tmp_path / "a.ckpt", module, optimizer)
    assert not optimizer.state


def test_parameter_without_gradient_has_no_state_and_step_stays_a_cpu_scalar(tmp_path: Path) -> None:
    run_on_ranks(2, leg, "shard", "adamw", range(2), None, tmp_path / "a.ckpt", True)
    module = build("one")
    optimizer = make_optimizer(module, "adamw")
    restore(tmp_path / "a.ckpt", module, optimizer)
    assert module.unused.weight not in optimizer.state
    step = optimizer.state[module.hidden.weight]["step"]
    assert (step.shape, step.dtype, step.item()) == ((), torch.float32, 2)


def test_directory_holds_every_tensor_once(tmp_path: Path) -> None:
    run_on_ranks(4, leg, "hybrid", "adamw", range(1), None, tmp_path / "a.ckpt", True)
    module = build("one")
    optimizer = make_optimizer(module, "adamw")
    train(module, optimizer, range(1))
    from torch.distributed.checkpoint import FileSystemReader

    index = FileSystemReader(tmp_path / "a.ckpt").read_metadata()
    stored = {key: value for key, value in index.state_dict_metadata.items() if hasattr(value, "chunks")}
    counts = {key: sum(chunk.sizes.numel() for chunk in value.chunks) for key, value in stored.items()}
    assert counts["model.embed.weight"] == module.embed.weight.numel()
    places = {
        name: {(info.relative_path, info.offset) for where, info in index.storage_data.items() if where.fqn == name}
        for name in ("model.embed.weight", "model.head.weight")
    }
    assert places["model.head.weight"] == places["model.embed.weight"], "a tied parameter is written once"
    moments = {key: n for key, n in counts.items() if key.endswith("exp_avg")}
    assert sum(moments.values()) == sum(s["exp_avg"].numel() for s in optimizer.state.values())


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "single"])
def test_whole_module_beside_a_divided_optimizer_is_saved_as_a_divided_one(sharded: bool, tmp_path: Path) -> None:
    run_on_ranks(2, _save_divided_and_whole, tmp_path, sharded)
    divided, whole = (tmp_path / name for name in ("divided.ckpt", "whole.ckpt"))
    assert_same(checkpoint.load(whole), checkpoint.load(divided))
    if sharded:
        index = Directory.open(whole, True).index
        stored = {key: value for key, value in index.state_dict_metadata.items() if hasattr(value, "chunks")}
        chunks = {key: [chunk.sizes for chunk in value.chunks] for key, value in stored.items()}
        for name, tensor in build("one").state_dict().items():
            assert name == "head.weight" or chunks[f"model.{name}"] == [tensor.shape], f"{name} is written once"
        places = [(info.relative_path, info.offset) for info in index.storage_data.values()]
        assert len(places) == len(set(places))


def test_compiled_module_saves_and_loads_plain_names(tmp_path: Path) -> None:
    module = build("one")
    module.hidden = torch.compile(module.hidden)  # type: ignore[assignment]
    state = checkpoint.model_state(module)
    assert list(state) == list(build("one").state_dict())
    other = build("one", seed=1)
    checkpoint.load_model_state(other, state)
    checkpoint.load_model_state(module, build("one", seed=2).state_dict())
    assert torch.equal(module.hidden.weight, build("one", seed=2).hidden.weight)
    by_name = checkpoint.optimizer_state_by_name(make_optimizer(module, "adamw"), checkpoint.parameter_names(module))
    assert "hidden.weight" in by_name["param_groups"][0]["params"]


def test_callback_may_hold_sharded_tensors(tmp_path: Path) -> None:
    run_on_ranks(2, _sharded_callback, tmp_path)
    for name in ("sharded.ckpt", "single.ckpt"):
        state = checkpoint.load(tmp_path / name)
        assert torch.equal(state["callbacks"]["average"][0], build("one").hidden.weight.detach())


def _full_state(path: Path) -> dict[str, Any]:
    state = checkpoint.load(path)
    return {"state_dict": dict(state["state_dict"]), "states": with_indices(state["optimizer_states"][0])["state"]}


def _roundtrip(layout: str, path: Path, sharded: bool) -> bool:
    module = build(layout)
    optimizer = make_optimizer(module, "adamw")
    train(module, optimizer, range(3))
    checkpoint.save(snapshot(module, optimizer), path, sharded=sharded)
    saved = snapshot(module, optimizer)
    other = build(layout, seed=1)
    other_optimizer = make_optimizer(other, "adamw")
    rest = restore(path, other, other_optimizer)
    assert rest["epoch"] == 1
    assert rest["callbacks"]["Score"]["best"] == 0.5

    def local(_: Any, value: Any) -> Any:
        return (value.to_local(), value.placements) if isinstance(value, DTensor) else value

    assert_same(map_leaves(snapshot(other, other_optimizer), local), map_leaves(saved, local))
    return True


def _save_divided_and_whole(folder: Path, sharded: bool) -> None:
    module, whole = build("shard"), build("one", seed=1)
    optimizer = make_optimizer(module, "adamw")
    train(module, optimizer, range(2))
    divided, names = snapshot(module, optimizer), checkpoint.parameter_names(module)
    checkpoint.save(divided, folder / "divided.ckpt", sharded=sharded)
    whole.load_state_dict({name: checkpoint.full(value) for name, value in divided["state_dict"].items()})
    del module  # what the optimizer holds is no module's any more
    states = [checkpoint.optimizer_state_by_name(optimizer, names)]
    given_back = {**divided, "state_dict": checkpoint.model_state(whole), "optimizer_states": states}
    checkpoint.save(given_back, folder / "whole.ckpt", sharded=sharded)


class Factored(torch.optim.Optimizer):
    """Row and column statistics in place of the full second moment, as Adafactor has them."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or p.ndim < 2:
                    continue
                state = self.state[p]
                square = p.grad.square() + 1e-8
                rows, columns = square.mean(1, keepdim=True), square.mean(0, keepdim=True)
                if isinstance(p, DTensor):
                    from torch.distributed.tensor import Replicate

                    whole = [Replicate()] * p.device_mesh.ndim
                    rows, columns = rows.redistribute(placements=whole), columns.redistribute(placements=whole)
                state["rows"] = rows + state.get("rows", 0)
                state["columns"] = columns + state.get("columns", 0)
                p.sub_(group["lr"] * p.grad / (state["rows"] * state["columns"] / state["rows"].mean()).sqrt())


def _factored(path: Path) -> None:
    module, plain = build("shard"), build("one")
    optimizer, plain_optimizer = Factored(module.parameters()), Factored(plain.parameters())
    train(module, optimizer, range(2))
    train(plain, plain_optimizer, range(2))
    checkpoint.save(snapshot(module, optimizer), path, sharded=True)
    other = build("shard", seed=1)
    other_optimizer = Factored(other.parameters())
    restore(path, other, other_optimizer)
    assert other_optimizer.state[other.hidden.weight]["rows"].full_tensor().shape == (7, 1)
    losses = train(other, other_optimizer, range(2, 4))
    assert losses == pytest.approx(train(plain, plain_optimizer, range(2, 4)), abs=1e-5)


def _plain_state() -> str:
    module = build("shard")
    optimizer = make_optimizer(module, "sgd")
    optimizer.state[module.hidden.weight]["history"] = torch.zeros(4)
    with pytest.raises(ValueError, match="plain tensor") as error:
        checkpoint.optimizer_state_by_name(optimizer, checkpoint.parameter_names(module))
    return str(error.value)


def _sharded_callback(folder: Path) -> None:
    module = build("shard")
    state = snapshot(module, make_optimizer(module, "sgd"))
    state["callbacks"] = {"average": [module.hidden.weight.detach().clone()]}
    checkpoint.save(state, folder / "sharded.ckpt", sharded=True)
    checkpoint.save(state, folder / "single.ckpt", sharded=False)
