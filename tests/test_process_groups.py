"""The process groups of a layout: their names, members and timeouts, on any rank of a world that is not there."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_dist import Layout
from lightning_dist.compat.distributed import timeout_of
from lightning_dist.parallel.buffers import share_batch_statistics
from lightning_dist.parallel.pipeline.schedule import SCHEDULES
from lightning_dist.parallel.pipeline.stages import Pipeline, Stages
from lightning_dist.parallel.pipeline.tied_gradients import TiedGradients
from lightning_dist.patches import Patches
from lightning_dist.ranks import LayoutRanks
from tests.support.ranks import run_on_ranks

CPU = torch.device("cpu")


def _tied_and_later(rank: int, layout: Layout) -> tuple[list[list[int]], str]:
    """The groups of tied parameters on a rank, and the name of a group that the world makes after them."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        mesh = layout.build_mesh("cpu")
        module = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in range(4))
        owners = {"0": (0,), "1": (0, 2), "2": (1, 2), "3": (0, 2)}
        stages = Stages(SCHEDULES["1F1B"], 3, ("first", "second"), owners=owners, buffers={})
        groups = TiedGradients(module, Pipeline(stages, mesh.root["pp"].get_group(), CPU), mesh.pipelines).groups
        tied = [dist.get_process_group_ranks(group) for _, group in groups]
        later: Any = dist.new_group(backend="fake")
        return tied, later.group_name
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("layout", ["pp=3", "pp=3,dp_shard=2", "pp=3,dp_replicate=2,tp=2"])
def test_groups_of_tied_parameters_leave_later_groups_one_name_on_all_ranks(layout: str) -> None:
    parsed = Layout.parse(layout)
    ranks = [_tied_and_later(rank, parsed) for rank in range(parsed.world_size)]
    assert len({name for _, name in ranks}) == 1
    num_pipelines = parsed.world_size // 3
    for rank, (tied, _) in enumerate(ranks):
        stage, pipeline = divmod(rank, num_pipelines)
        expected = [stages for stages in ([0, 2], [1, 2]) if stage in stages]
        assert tied == [[pipeline + num_pipelines * stage for stage in stages] for stages in expected]


@pytest.mark.parametrize("layout", ["dp_shard=2,tp=2", "pp=2,dp_replicate=2"])
def test_batch_statistics_are_shared_over_the_data_ranks_alone(layout: str) -> None:
    """By themselves they would be shared over the world: by other stages, or twice for a sample."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        data, patches = Layout.parse(layout).build_mesh("cpu").data.get_group(), Patches()
        module = nn.Sequential(nn.SyncBatchNorm(2), nn.SyncBatchNorm(2, process_group=dist.group.WORLD))
        share_batch_statistics(module, data, patches)
        assert [child.process_group for child in module] == [data, dist.group.WORLD]
        patches.undo()
        assert [child.process_group for child in module] == [None, dist.group.WORLD]
    finally:
        dist.destroy_process_group()


def _ranks(layout: str) -> LayoutRanks:
    ranks = LayoutRanks(Layout.parse(layout), timeout=timedelta(seconds=77))
    ranks.layout, ranks.world_size = ranks.requested, dist.get_world_size()
    ranks.form_mesh()
    return ranks


def _timeouts(layout: str) -> list[timedelta]:
    ranks = _ranks(layout)
    return [timeout_of(group, CPU) for group in ranks.groups.values() if group is not dist.group.WORLD]


def test_every_group_has_the_timeout_of_the_strategy() -> None:
    for timeouts in run_on_ranks(4, _timeouts, "dp_shard=2,tp=2"):
        assert timeouts == [timedelta(seconds=77)] * 7


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("dp_shard=8", [8]),
        ("dp_replicate=2,dp_shard=4", [2, 4, 8]),
        ("dp_shard=4,tp=2", [2, 4, 8]),
        ("pp=2,dp_shard=2,tp=2", [2, 2, 2, 4, 8]),
    ],
)
def test_no_two_groups_of_a_layout_have_the_same_ranks(layout: str, expected: list[int]) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        mesh = Layout.parse(layout).build_mesh("cpu")
        ranks = [dist.get_process_group_ranks(group) for group in distributed_c10d._world.pg_map]
        assert sorted(len(members) for members in ranks if len(members) > 1) == expected
        assert mesh.data.size() * mesh.root["pp"].size() == mesh.logs.size()
    finally:
        dist.destroy_process_group()


def _of_hosts(layout: str) -> list[tuple[list[int], timedelta]]:
    ranks = _ranks(layout)
    assert ranks.mesh is not None
    assert ranks.hosts == (dist.group.WORLD, ranks.mesh.logs.get_group())
    of_devices = _ranks(layout)
    of_devices.device = torch.device("cuda", 0)
    assert of_devices.hosts is of_devices.hosts
    assert not {*of_devices.hosts} & {*of_devices.groups.values()}
    assert all(dist.get_backend(group) == "gloo" for group in of_devices.hosts)
    return [(dist.get_process_group_ranks(group), timeout_of(group, CPU)) for group in of_devices.hosts]


@pytest.mark.parametrize("layout", ["dp_shard=2,tp=2", "pp=2,dp_replicate=2"])
def test_hosts_of_devices_have_groups_of_their_own_with_the_same_ranks(layout: str) -> None:
    timeout = timedelta(seconds=77)
    for rank, found in enumerate(run_on_ranks(4, _of_hosts, layout)):
        logs = [rank % 2, rank % 2 + 2] if "tp" in layout else [0, 1, 2, 3]
        assert found == [([0, 1, 2, 3], timeout), (logs, timeout)]
