"""What fabric.save writes under one layout goes on in any other, and in one process, plain Fabric among them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_dist import checkpoint as checkpoints
from tests.fabric.loop import LAYOUTS, TOLERANCE, Loop, Net, Training, fabric_for, go_on, save, train
from tests.support.parity import assert_equal, once, slow, whole_weights
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

LOOP = Loop(clip={"max_norm": 0.3}, schedules=True, count=12)
STEPS = 2  # of an epoch
FROM = [(None, 1), *LAYOUTS]
INTO = [*FROM, ("dp_replicate=1", 1)]


def _on(num_ranks: int, function: Callable[..., Any], *args: Any) -> Any:
    return run_on_ranks(num_ranks, function, *args) if num_ranks > 1 else [function(*args)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fabric")
    paths = {}
    for layout, num_ranks in FROM:
        paths[str(layout)] = folder / f"{layout}.ckpt"
        _on(num_ranks, save, LOOP, layout, paths[str(layout)])
    return paths


def _go_on_from_all(layout: str | None, paths: list[Path]) -> list[Any]:
    return [go_on(LOOP, layout, path) for path in paths]


def test_is_a_file_or_a_directory(saved: dict[str, Path]) -> None:
    forms = {layout: path.is_dir() for layout, path in saved.items()}
    divided = {"dp_shard=2", "tp=2", "dp_shard=2,tp=2"}
    assert forms == {layout: layout in divided for layout in forms}


def test_single_file_is_that_of_plain_fabric(saved: dict[str, Path]) -> None:
    plain, ours = (torch.load(saved[layout]) for layout in ("None", "dp_replicate=2"))
    assert plain.keys() == ours.keys()
    assert list(plain["model"]) == list(ours["model"])
    assert plain["optimizer"]["param_groups"][0]["params"] == ours["optimizer"]["param_groups"][0]["params"]
    assert plain["optimizer"]["state"].keys() == ours["optimizer"]["state"].keys()


@pytest.mark.parametrize(("layout", "num_ranks"), [case if case[1] < 4 else slow(*case) for case in INTO])
def test_goes_on_from_every_layout(layout: str | None, num_ranks: int, saved: dict[str, Path]) -> None:
    expected = once(train, LOOP, None)
    # plain Fabric reads files; a directory is read by ours in one process, too
    paths = [path for path in saved.values() if layout is not None or path.is_file()]
    assert len(paths) == (2 if layout is None else 5)
    for of_rank in _on(num_ranks, _go_on_from_all, layout, paths):
        for record, rest, mean in of_rank:
            record.norms = expected.norms[:STEPS] + record.norms
            assert_equal(expected, record, TOLERANCE)
            assert rest == {"mean": torch.Tensor}
            torch.testing.assert_close(float(mean), sum(expected.losses[:STEPS]) / STEPS)


def _raw(layout: str, path: Path, whole: Path) -> list[dict[str, Any]]:
    """What a module, an optimizer, a missing key and a filter make of files."""
    training = Training(LOOP, layout)
    fabric, state = training.fabric, {"model": training.model, "other": 1}
    with pytest.raises(KeyError, match="other"):
        fabric.load(path, dict(state))
    rest = fabric.load(path, state, strict=False)
    assert state["other"] == 1
    assert rest.keys() == {"optimizer", "scheduler", "losses", "mean"}
    assert set(rest["optimizer"]["state"]) <= set(range(100))  # by index, as torch writes it
    loaded = whole_weights(training.model.module)
    for parameter in training.model.parameters():
        parameter.data.zero_()
    fabric.load_raw(whole, training.model)
    raw = whole_weights(training.model.module)
    alone = {"optimizer": training.optimizer}
    fabric.load(path, alone)  # without its model: by the order of its parameters
    steps = {float(value["step"]) for value in training.optimizer.state.values()}
    assert steps == {STEPS}
    everything = fabric.load(path)
    assert everything.keys() == {"model", *rest}
    fabric.save(path.with_name("filtered"), {"model": training.model}, filter={"model": _no_bias})
    with pytest.raises(ValueError, match="bias"):
        fabric.load(path.with_name("filtered"), {"model": training.model})
    fabric.load(path.with_name("filtered"), {"model": training.model}, strict=False)
    return [loaded, raw, {name: torch.as_tensor(value) for name, value in everything["model"].items()}]


def _no_bias(name: str, value: Any) -> bool:
    return "bias" not in name


@pytest.mark.parametrize(("layout", "num_ranks"), [("dp_replicate=2", 2), slow("dp_shard=2,tp=2", 4)])
def test_loads_some_of_it(layout: str, num_ranks: int, saved: dict[str, Path], tmp_path: Path) -> None:
    one = torch.load(saved["None"])
    torch.save(one["model"], tmp_path / "raw.pt")
    for of_rank in run_on_ranks(num_ranks, _raw, layout, saved[layout], tmp_path / "raw.pt"):
        for weights in of_rank:
            assert weights.keys() == one["model"].keys()
            for name, weight in weights.items():
                torch.testing.assert_close(weight, one["model"][name], rtol=1e-4, atol=1e-5)


def test_directory_is_converted_to_a_file(saved: dict[str, Path], tmp_path: Path) -> None:
    checkpoints.convert(saved["tp=2"], tmp_path / "whole.ckpt")
    record, _, _ = go_on(LOOP, "dp_replicate=1", tmp_path / "whole.ckpt")
    expected = once(train, LOOP, None)
    record.norms = expected.norms[:STEPS] + record.norms
    assert_equal(expected, record, TOLERANCE)


def _two(path: Path) -> list[float]:
    """Two modules, of which the key of one begins as the other's, and one optimizer of both."""
    fabric = fabric_for("dp_shard=2")
    fabric.seed_everything(1, verbose=False)
    found = []
    for _ in range(2):
        one, two = fabric.setup(Net()), fabric.setup(nn.Linear(4, 4))
        optimizer = fabric.setup_optimizers(torch.optim.Adam([*one.parameters(), *two.parameters()]))
        state = {"net": one, "net.2": two, "optimizer": optimizer}
        if found:
            fabric.load(path, state)
        else:
            fabric.save(path, state)
        found.append(sum(float(p.sum()) for model in (one, two) for p in model.parameters()))
    return found


def test_several_modules(tmp_path: Path) -> None:
    for first, second in run_on_ranks(2, _two, tmp_path / "two"):
        assert first == pytest.approx(second)


def test_damaged_file_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "half.ckpt").write_bytes(saved["None"].read_bytes()[:5000])
    load = partial(fabric_for("dp_replicate=1").load, tmp_path / "half.ckpt")
    with pytest.raises(ValueError, match="damaged"):
        load()
