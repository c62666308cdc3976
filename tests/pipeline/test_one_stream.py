"""No schedule stalls where a communicator runs its sends and receives one after the other, as NCCL does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dist.parallel.pipeline.p2p import P2PTensors
from lightning_dist.parallel.pipeline.schedule import SCHEDULES
from lightning_dist.parallel.pipeline.schedule_runs import InOrder, Timeline, torch_schedule
from lightning_dist.parallel.pipeline.stages import Pipeline, Stages
from tests.support.one_stream import Op, recorded, stalled

pytestmark = pytest.mark.sampled

CPU = torch.device("cpu")


def _sends(name: str, rank: int, num_ranks: int, num_microbatches: int, trains: bool) -> list[list[Op]]:
    schedule = SCHEDULES[name]
    cuts = tuple(f"cut {number}" for number in range(schedule.num_stages(num_ranks) - 1))
    stages = Stages(schedule, num_ranks, cuts, owners={}, buffers={})
    p2p = [P2PTensors((1,), (torch.float32,)) for _ in cuts]
    step: Any = SimpleNamespace(p2p=p2p, batch=SimpleNamespace(parts=range(num_microbatches)))
    weights = {stage: nn.Parameter(torch.ones(1)) for stage in stages.of_rank(rank)}

    def microbatch(_step: Any, stage: int, _index: int, received: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (weights[stage] * (received[0] if received else 1),)

    def run(group: Any) -> None:
        pipeline = Pipeline(stages, group, CPU)
        if not trains:
            InOrder(microbatch, step, pipeline).forward()
        elif schedule.takes(num_microbatches, num_ranks):
            torch_schedule(pipeline, microbatch, lambda stage: [weights[stage]], step, Timeline(CPU))(step)
        else:
            InOrder(microbatch, step, pipeline).forward_and_backward()

    return recorded(rank, num_ranks, run)


@pytest.mark.parametrize("trains", [True, False], ids=["train", "evaluate"])
@pytest.mark.parametrize(
    "num_ranks", [2, 3, 4, *(pytest.param(number, marks=pytest.mark.slow) for number in range(5, 9))]
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_rank_waits_for_ever(name: str, num_ranks: int, trains: bool) -> None:
    for number in range(1, 4 * num_ranks + 1):
        ranks = [_sends(name, rank, num_ranks, number, trains) for rank in range(num_ranks)]
        assert any(ranks)
        assert not stalled(ranks), f"{number} microbatches"


def test_a_rank_that_sends_before_it_receives_waits_for_ever() -> None:
    both = [[[("send", 1)], [("receive", 1)]], [[("send", 0)], [("receive", 0)]]]
    assert stalled(both) == [0, 1]
    assert not stalled([[[("send", 1), ("receive", 1)]], [[("send", 0), ("receive", 0)]]])
    assert not stalled([both[0], [[("receive", 0)], [("send", 0)]]])
