"""Layouts: what can be written, what is refused, which ranks an axis joins."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from lightning_dist import Layout
from lightning_dist.cli import main
from tests.support.ranks import run_on_ranks


@pytest.mark.parametrize(
    "written",
    ["dp_shard=2,tp=2", " dp_shard = 2 , tp = 2 ", {"dp_shard": 2, "tp": 2}, Layout(dp_shard=2, tp=2)],
)
def test_a_layout_is_a_string_a_mapping_or_itself(written: Any) -> None:
    assert Layout.parse(written) == Layout(dp_shard=2, tp=2)


@pytest.mark.parametrize("layout", [Layout(), Layout(dp_shard=4), Layout(dp_replicate=-1, tp=2, pp=3)])
def test_a_printed_layout_reads_back(layout: Layout) -> None:
    assert Layout.parse(str(layout)) == layout


def test_auto_is_no_layout_yet() -> None:
    assert Layout.parse("auto") is None


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("dp_shrad=2", "no axis 'dp_shrad'; did you mean 'dp_shard'?"),
        ({"data": 2}, "no axis 'data'"),
        ("dp_shard=0", "has degree 0"),
        ("dp_shard=-2", "has degree -2"),
        ("dp_shard=two", "needs an integer degree, got 'two'"),
        ({"dp_shard": 2.0}, "needs an integer degree, got 2.0"),
        ({"dp_shard": True}, "needs an integer degree, got True"),
        ({"dp_shard": None}, "needs an integer degree, got None"),
        ("dp_shard=-1,tp=-1", "-1 for dp_shard and tp; only one axis"),
        ("ep=-1", "can't be -1"),
        ("dp_shard=2,dp_shard=4", "names the axis 'dp_shard' twice"),
        ("dp_shard", "is not axis=degree"),
        ("", "names no axis"),
        (4, "got int: 4"),
    ],
)
def test_a_wrong_layout_is_refused(written: Any, message: str) -> None:
    with pytest.raises(ValueError, match="layout") as error:
        Layout.parse(written)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("layout", "world_size", "resolved"),
    [
        (Layout(dp_shard=-1), 4, Layout(dp_shard=4)),
        (Layout(dp_replicate=-1, dp_shard=2), 8, Layout(dp_replicate=4, dp_shard=2)),
        (Layout(dp_shard=-1, tp=2, pp=2), 4, Layout(tp=2, pp=2)),
        (Layout(dp_shard=4, ep=2), 4, Layout(dp_shard=4, ep=2)),
    ],
)
def test_minus_one_takes_what_is_left(layout: Layout, world_size: int, resolved: Layout) -> None:
    assert layout.resolve(world_size) == resolved
    assert resolved.world_size == world_size


@pytest.mark.parametrize(
    ("layout", "world_size", "near"),
    [
        (Layout(dp_shard=3), 4, '"dp_shard=4"'),
        (Layout(dp_shard=2), 4, '"dp_shard=4"'),
        (Layout(dp_shard=-1, tp=3), 4, '"tp=4"'),
        (Layout(tp=2, dp_shard=2), 8, '"dp_shard=4,tp=2"'),
        (Layout(dp_shard=2), 1, '"dp_replicate=1"'),
    ],
)
def test_a_misfit_names_the_nearest_layouts(layout: Layout, world_size: int, near: str) -> None:
    with pytest.raises(ValueError, match="layouts that fit") as error:
        layout.resolve(world_size)
    assert near in str(error.value)
    for written in str(error.value).split("layouts that fit: ")[1].split('", "'):
        fitting = Layout.parse(written.strip('"'))
        assert fitting is not None
        assert fitting.resolve(world_size).world_size == world_size


def test_experts_borrow_from_the_shards() -> None:
    with pytest.raises(ValueError, match="must divide it"):
        Layout(dp_shard=2, ep=4).resolve(2)


def test_mesh_axes_join_the_ranks_that_the_layout_says() -> None:
    groups = run_on_ranks(4, _groups, "dp_replicate=2,dp_shard=2")
    assert groups[0] == {"dp_replicate": [0, 2], "dp_shard": [0, 1], "tp": [0], "data": [0, 1, 2, 3]}
    assert groups[3]["dp_replicate"] == [1, 3]
    assert [group["place"] for group in run_on_ranks(4, _places, "dp_shard=2,tp=2")] == [
        {"pp": 0, "dp_replicate": 0, "dp_shard": s, "cp": 0, "tp": t} for s in (0, 1) for t in (0, 1)
    ]


def _groups(written: str) -> dict[str, list[int]]:
    layout = Layout.parse(written)
    assert layout is not None
    mesh = layout.resolve(dist.get_world_size()).build_mesh("cpu")
    axes = {axis: mesh.root[axis] for axis in ("dp_replicate", "dp_shard", "tp")}
    axes["data"] = mesh.data
    return {axis: dist.get_process_group_ranks(part.get_group()) for axis, part in axes.items()}


def _places(written: str) -> dict[str, Any]:
    layout = Layout.parse(written)
    assert layout is not None
    layout = layout.resolve(dist.get_world_size())
    root = layout.build_mesh("cpu").root
    place = layout.coordinates(dist.get_rank())
    assert [place[axis] for axis in root.mesh_dim_names or ()] == list(root.get_coordinate() or ())
    return {"place": place}


def test_the_command_shows_who_does_what(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layout", "dp_replicate=2,dp_shard=-1", "--ranks", "4"]) == 0
    assert "dp_replicate=2,dp_shard=2 on 4 ranks" in capsys.readouterr().out


def test_the_command_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layout", "dp_shard=3", "--ranks", "4"]) == 2
    assert capsys.readouterr().err.startswith("lightning-dist: layout dp_shard=3 needs 3 ranks, but there are 4")
    assert main(["convert", "nowhere", "file.ckpt"]) == 2
    assert "nowhere" in capsys.readouterr().err
