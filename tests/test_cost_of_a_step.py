"""A step of a module that does nothing special costs what its layout costs, and nothing for what others may do."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from tests.support import models
from tests.support.collectives import Collectives
from tests.support.models import BLOCK_PLAN, samples
from tests.support.parity import QUIET
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled


class Counting(L.Callback):
    """Counts the collectives from the start of one batch to that of the next, hooks and logs included."""

    def __init__(self) -> None:
        self.steps: list[dict[str, int]] = []
        self._open: Collectives | None = None

    def on_train_batch_start(self, *args: Any) -> None:
        self._close()
        self._open = Collectives()
        self._open.__enter__()

    def on_train_end(self, *args: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self.steps.append(dict(self._open.count))


def _steady(layout: str, **options: Any) -> list[dict[str, int]]:
    counting = Counting()
    strategy = HybridStrategy(layout, tensor_plan=BLOCK_PLAN if "tp" in layout else None, **options)
    quiet = {**QUIET, "log_every_n_steps": 1000, "max_epochs": 1}
    trainer = L.Trainer(**quiet, devices=2, strategy=strategy, callbacks=[counting])
    trainer.fit(models.Classifier(), DataLoader(samples(), batch_size=4))
    return counting.steps[3:6]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        # gradients; whether to stop or to end, in place of Lightning's broadcast
        ("dp_replicate=2", {"all-reduce": 2}),
        # a root and three blocks, of which the blocks are gathered twice; what was used; whether to stop
        ("dp_shard=2", {"all-gather": 7, "reduce-scatter": 4, "all-reduce": 2}),
        # three blocks, forward and backward; whether to stop
        ("tp=2", {"all-reduce": 7}),
        # eight microbatches there and back; the loss, and whether all went well; what is logged, and whether to stop
        ("pp=2", {"send": 4, "receive": 4, "all-reduce": 3}),
    ],
)
def test_a_plain_step_costs_no_more_than_its_layout(layout: str, expected: dict[str, int]) -> None:
    for steps in run_on_ranks(2, _steady, layout):
        assert steps == [expected] * 3


def _looked_at() -> list[list[dict[str, int]]]:
    return [
        _steady("dp_replicate=2", on_nonfinite="skip", on_spike="report"),
        _steady("dp_replicate=2", replay_every_n_steps=5),
    ]


def test_looking_at_a_step_costs_one_all_reduce_and_a_replay_the_step_once_more() -> None:
    for looked_at, replayed in run_on_ranks(2, _looked_at):
        assert looked_at == [{"all-reduce": 3}] * 3
        assert replayed == [{"all-reduce": 2}, {"all-reduce": 3, "all-gather": 2}, {"all-reduce": 2}]
