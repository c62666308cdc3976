"""What is shown of a layout: at the start of a run, and by ``lightning-dist explain`` without one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from lightning_dist.cli import main
from lightning_dist.explain import build_deferred
from lightning_dist.report import LayoutReport
from tests.recipes.runs import Blocks, uneven_decoder
from tests.support.models import Huge
from tests.support.parity import slow
from tests.support.ranks import run_on_ranks
from tests.support.reports import report_of_a_fit

pytestmark = pytest.mark.sampled


def _reports(layout: str, sequence_parallel: bool) -> tuple[LayoutReport, LayoutReport]:
    """What was planned for this layout, and what this rank holds."""
    strategy = HybridStrategy(layout, sequence_parallel=sequence_parallel)
    planned = strategy.explain(build_deferred(uneven_decoder), dist.get_world_size())
    loader = DataLoader(Blocks(16), batch_size=4)
    return planned, report_of_a_fit(uneven_decoder(), loader, strategy, dist.get_world_size())


@pytest.mark.parametrize("layout", ["tp=2", "dp_shard=2", "dp_shard=2,tp=2", slow("dp_replicate=2,tp=2")])
def test_what_is_explained_is_what_the_ranks_hold(layout: str) -> None:
    num_ranks = 2 ** layout.count("=")
    reports = run_on_ranks(num_ranks, _reports, layout, "tp" in layout)
    planned = reports[0][0]
    assert planned.rank_bytes == max(real.rank_bytes for _, real in reports)
    assert planned.units == reports[0][1].units
    assert planned.sharding_plan == reports[0][1].sharding_plan
    assert planned.num_parameters == sum(p.numel() for p in build_deferred(uneven_decoder).parameters())


def test_the_sharding_plan_is_told_block_by_block() -> None:
    sharding_plan = (
        HybridStrategy("tp=2", sequence_parallel=True).explain(build_deferred(uneven_decoder), 2).sharding_plan
    )
    assert sharding_plan is not None
    told = {row.name: (row.count, row.split) for row in sharding_plan.divided}
    assert told["model.blocks.*.attention"] == (2, "by heads: query, key, value; output by its inputs")
    assert told["model.blocks.*.feed_forward"] == (2, "by columns: gate, up; down by its inputs")
    assert told["model.embedding"] == (1, "by vocabulary")
    assert {row.name for row in sharding_plan.whole} == {
        "model.norm",
        "model.blocks.*.attention_norm",
        "model.blocks.*.feed_forward_norm",
    }
    assert sharding_plan.sequence_blocks == ["model.blocks.*"]


def test_a_module_that_fits_no_machine_is_explained() -> None:
    module = build_deferred(Huge)
    assert all(p.is_meta for p in module.parameters())
    report = HybridStrategy("dp_shard=4,tp=2").explain(module, 8)
    assert report.whole_bytes > 4e11
    assert 1.0 < 8 * report.rank_bytes / report.whole_bytes < 1.001


def test_the_command_takes_a_class_or_overrides_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "tests.support.models:Huge", "width=64", "--layout", "tp=2"]) == 0
    output = capsys.readouterr().out
    assert "layers.*" in output
    assert "41,600" in output
    assert main(["explain", "recipe=language_model", "strategy.layout.tp=2", "strategy.sequence_parallel=true"]) == 0
    output = capsys.readouterr().out
    assert "model.blocks.*" in output
    assert "positions" in output


def test_recipes_are_those_of_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["explain", "width=8"]) == 2
    assert "has [tool.lightning_dist] recipes" in capsys.readouterr().err
    (tmp_path / "pyproject.toml").write_text('[tool.lightning_dist]\nrecipes = "recipes_of_mine:of"\n')
    (tmp_path / "recipes_of_mine.py").write_text(
        "from lightning_dist import HybridStrategy\nfrom lightning_dist.explain import Subject, parse_arguments\n"
        "from tests.support.models import Huge\n"
        "def of(arguments):\n"
        "    return Subject(lambda: Huge(**parse_arguments(arguments)), HybridStrategy('dp_shard=2'), 2)\n"
    )
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert main(["explain", "width=64"]) == 0
    assert "41,600" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tests.support.models:Huge"], "--layout is missing"),
        (["tests.support.models:Hug", "--layout", "tp=2"], "can't be imported"),
        (["tests.support.models:Huge", "with=64", "--layout", "tp=2"], "unexpected keyword argument 'with'"),
        (["tests.support.models:WIDTH", "--layout", "tp=2"], "not a callable object"),
        (["tests.support.models:Huge", "width=64", "--layout", "dp_shard=-1"], "--ranks is missing"),
        (["recipe=nope"], "Could not find 'recipe/nope'"),
        (["strategy=ddp"], "DDPStrategy has no layout to explain"),
        (["recipe=language_model", "strategy.layout.tp=3", "trainer.devices=3"], "degrees that do: 1, 2"),
        (["recipe=language_model", "--layout", "tp=2"], "a recipe takes overrides"),
    ],
)
def test_what_can_not_be_explained_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", *arguments]) == 2
    error: Any = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_the_start_of_a_run_shows_the_sharding_plan(capsys: pytest.CaptureFixture[str]) -> None:
    HybridStrategy("tp=2").explain(build_deferred(uneven_decoder), 2).print()
    output = capsys.readouterr().out
    assert "whole on every rank" in output
    assert "by vocabulary" in output
