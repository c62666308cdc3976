"""What is shown of a pipeline: its stages before a run, and a step of it as it went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy, PipelineTimeline
from lightning_dist.cli import main
from lightning_dist.explain import build_deferred
from lightning_dist.parallel.pipeline.schedule_runs import Event
from lightning_dist.report import LayoutReport
from lightning_dist.report.timeline import draw, waiting
from tests.recipes.runs import Blocks, uneven_decoder
from tests.support.models import deep, samples
from tests.support.parity import QUIET, slow
from tests.support.ranks import run_on_ranks
from tests.support.reports import report_of_a_fit

pytestmark = pytest.mark.sampled


def _reports(layout: str, schedule: str) -> tuple[LayoutReport, LayoutReport]:
    strategy = HybridStrategy(layout, pipeline_schedule=schedule)
    loader = DataLoader(Blocks(16), batch_size=4)
    planned = strategy.explain(build_deferred(uneven_decoder), dist.get_world_size(), next(iter(loader)))
    return planned, report_of_a_fit(uneven_decoder(), loader, strategy, dist.get_world_size())


@pytest.mark.parametrize(
    ("layout", "schedule", "num_ranks"),
    [
        ("pp=2", "1F1B", 2),
        ("pp=2", "ZBVZeroBubble", 2),
        *(slow(f"pp=2,{axis}=2", "1F1B", 4) for axis in ("tp", "dp_shard")),
    ],
)
def test_the_stages_that_are_explained_are_those_of_the_ranks(layout: str, schedule: str, num_ranks: int) -> None:
    reports = run_on_ranks(num_ranks, _reports, layout, schedule)
    planned = reports[0][0]
    assert planned.rank_bytes == max(real.rank_bytes for _, real in reports)
    assert planned.pipeline is not None
    assert planned.pipeline == reports[0][1].pipeline
    assert sum(row.cost for row in planned.pipeline.rows) == pytest.approx(1)
    assert planned.pipeline.balance <= planned.pipeline.equal_balance


def test_the_command_shows_stages_and_the_expected_bubble(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "recipe=language_model", "strategy.layout.pp=2", "strategy.num_microbatches=4"]) == 0
    output = capsys.readouterr().out
    assert "pp=2, 1F1B" in output
    assert "model.blocks." in output
    assert "20%" in output


def test_a_recorded_step_shows_every_microbatch_of_every_stage(tmp_path: Path) -> None:
    bubble, other = run_on_ranks(2, _recorded, tmp_path)
    assert bubble == other
    assert 0 < bubble < 1
    events = [e for e in json.loads((tmp_path / "timeline.json").read_text())["traceEvents"] if e["ph"] == "X"]
    seen = {(e["pid"], e["tid"], e["cat"], e["args"]["microbatch"]) for e in events}
    both = ("forward", "backward")
    assert seen == {(rank, rank, kind, index) for rank in range(2) for kind in both for index in range(4)}
    assert Image.open(tmp_path / "timeline.png").width > 1000


def _recorded(folder: Path) -> float | None:
    timeline = PipelineTimeline(step=2, directory=folder)
    strategy = HybridStrategy("pp=2", num_microbatches=4)
    trainer: Any = L.Trainer(**QUIET, devices=2, strategy=strategy, max_steps=4, callbacks=[timeline])
    trainer.fit(deep(), DataLoader(samples(), batch_size=8))
    return timeline.bubble


def test_waiting_is_what_the_parts_leave(tmp_path: Path) -> None:
    by_rank = [
        [Event("forward", 0, 0, 0.0, 1.0), Event("backward", 0, 0, 3.0, 4.0)],
        [Event("forward", 1, 0, 1.0, 2.0), Event("backward", 1, 0, 2.0, 3.0)],
    ]
    assert waiting(by_rank) == 0.5
    draw(by_rank, "two ranks", tmp_path / "two.png")
    image = torch.frombuffer(bytearray(Image.open(tmp_path / "two.png").convert("RGB").tobytes()), dtype=torch.uint8)
    assert len(image.view(-1, 3).unique(dim=0)) > 4
