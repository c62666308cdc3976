"""A loop under a layout gives the losses, norms and weights of plain Fabric in one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fabric.loop import LAYOUTS, TOLERANCE, Loop, Tied, momentum, train
from tests.support.parity import Record, assert_equal, once, slow
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

LOOPS = {
    "norm": Loop(clip={"max_norm": 0.3}, schedules=True),
    "value": Loop(optimizer=momentum, after=True, clip={"clip_val": 0.01}),
    "accumulate": Loop(optimizer=momentum, accumulate=2, clip={"max_norm": 0.3}),
    "tied": Loop(model=Tied, after=True, shuffle=True),
}


@pytest.fixture(scope="module", params=LOOPS)
def one(request: Any) -> tuple[Loop, Record]:
    loop = LOOPS[request.param]
    return loop, once(train, loop, None)


@pytest.mark.parametrize(("layout", "num_ranks"), [*LAYOUTS[:3], slow(*LAYOUTS[3])])
def test_equals_one_process(one: tuple[Loop, Record], layout: str, num_ranks: int) -> None:
    loop, expected = one
    assert len(expected.losses) == 16
    for record in run_on_ranks(num_ranks, train, loop, layout):
        assert_equal(expected, record, TOLERANCE)
