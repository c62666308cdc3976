"""An exception that user code catches: ranks that left a run together go on, else all end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist

from lightning_dist import HybridStrategy
from lightning_dist.elastic import guard
from tests.support.parity import QUIET, Watch, once, slow, whole_weights
from tests.support.ranks import RankError, run_on_ranks
from tests.support.scripts import ROOT, assert_no_process_left, finish, start
from tests.support.stops import Pruned, Stops, fit

pytestmark = pytest.mark.sampled

LAYOUTS = ["dp_replicate=2", "dp_shard=2", "tp=2", "pp=2", "dp_shard=2,tp=2"]


def go_on(layout: str | None, where: str, same_trainer: bool, same_module: bool) -> tuple[list[float], Any]:
    """Catches what the first fit raises, and fits again."""
    L.seed_everything(1, verbose=False)
    module = Stops(where)
    trainer = None
    watch = Watch()
    world = dist.get_world_size() if dist.is_initialized() else 1
    strategy: Any = "auto" if layout is None else HybridStrategy(layout)
    trainer = L.Trainer(**QUIET, devices=world, strategy=strategy, max_epochs=2, callbacks=[watch])
    with pytest.raises(Pruned, match=where):
        fit(module, layout, trainer)
    torch.manual_seed(2)
    if same_module:
        module.where = ""
    else:
        module = Stops("")
    _, losses = fit(module, layout, trainer if same_trainer else None)
    return losses, whole_weights(module)


PLACES = [("forward", False, False), ("backward", True, True), ("step", False, True), ("validation", True, False)]
"""Where a step fails, and whether the Trainer and the module are the same in the next fit."""
QUICK = [("dp_replicate=2", *PLACES[0]), ("dp_shard=2", *PLACES[1]), ("tp=2", *PLACES[2]), ("pp=2", *PLACES[3])]
CASES = [(layout, *place) for layout in LAYOUTS for place in PLACES]


@pytest.mark.parametrize(
    ("layout", "where", "same_trainer", "same_module"), [case if case in QUICK else slow(*case) for case in CASES]
)
def test_ranks_that_all_raised_go_on_as_one_process(
    layout: str, where: str, same_trainer: bool, same_module: bool
) -> None:
    ranks = 4 if "," in layout else 2
    if same_module and not same_trainer and "pp" in layout:
        pytest.skip("a module that was cut stays with its strategy")
    expected = once(go_on, None, where, same_trainer, same_module)
    for losses, weights in run_on_ranks(ranks, go_on, layout, where, same_trainer, same_module):
        torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weights, expected[1], rtol=1e-5, atol=1e-6)


def left_alone(layout: str) -> str:
    guard.PATIENCE = 2.0
    L.seed_everything(1, verbose=False)
    try:
        fit(Stops("backward", (1,)), layout)
    except Pruned:
        began = time.monotonic()
        try:
            fit(Stops(""), layout)
        except RuntimeError as error:
            assert time.monotonic() - began < 10
            return str(error)
        return "went on"
    finally:
        guard.PATIENCE = 30.0
    return "did not raise"


def test_a_rank_that_raised_alone_is_refused_its_next_run() -> None:
    with pytest.raises(RankError) as error:
        run_on_ranks(2, left_alone, "dp_replicate=2")
    answers = error.value.answers
    assert "rank 1 left a run by Pruned: backward, and rank 0 did not" in answers[1]
    assert "reduce_boolean_decision" in answers[1]


def apart() -> str:
    """Both ranks raise, at different places."""
    L.seed_everything(1, verbose=False)
    rank = dist.get_rank()

    class Apart(Stops):
        def on_train_batch_end(self, *args: Any) -> None:
            if rank == 1 and self.global_step == 3:
                dist.all_reduce(torch.ones(1), async_op=True)
            if self.global_step == 3:
                raise Pruned(f"of {rank}")

    try:
        fit(Apart(""), "dp_replicate=2")
    except Pruned:
        try:
            fit(Stops(""), "dp_replicate=2")
        except RuntimeError as error:
            return str(error)
    return "went on"


def test_ranks_that_raised_at_different_places_are_refused_together() -> None:
    for told in run_on_ranks(2, apart):
        assert "rank 0 by Pruned: of 0, rank 1 by Pruned: of 1" in told


SCRIPT = """
import os, sys, time
sys.path.insert(0, {root!r})
import lightning_dist
from lightning_dist.elastic import guard
from tests.support.stops import Pruned, Stops, fit, two_ranks
guard.PATIENCE = guard.GRACE = 1.0

class Tells(Stops):
    def on_train_start(self):
        print(f"pid {{os.getpid()}}\\n", end="", flush=True)

if __name__ == "__main__":
    module = Tells("backward", ({rank},))
    try:
        fit(module, "dp_replicate=2", two_ranks())
    except Pruned:
        print("caught", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("rank", [slow(0), slow(1)])
def test_all_end_where_a_rank_that_raised_alone_lives_on(rank: int, tmp_path: Path) -> None:
    began = time.monotonic()
    process = start(tmp_path, text=SCRIPT.format(root=ROOT, rank=rank))
    code, output = finish(process)
    assert code
    assert "caught" in output
    assert f"rank {rank} left a run by Pruned: backward, and rank {1 - rank} did not" in output
    assert time.monotonic() - began < 50, "somebody slept"
    assert_no_process_left(output)
