"""Ratios, verdicts, and what is written."""

import json
from pathlib import Path

import pytest

from recipes.benchmark.results import Line, counted, save, timed


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [((1.0, 1.02), "reached"), ((1.0, 1.03), "unclear"), ((1.03, 1.04), "missed")],
)
def test_verdict_is_that_of_all_estimates(ratios: tuple[float, float], verdict: str) -> None:
    assert Line("", "", "", "", dict(zip("ab", ratios, strict=True)), 1.02).verdict == verdict


def test_line_without_a_must_has_no_verdict() -> None:
    assert Line("", "", "", "", {"exact": 9.0}, None).verdict == ""


def test_paired_ratio_ignores_the_clock_of_a_round() -> None:
    swing = [1.0, 2.0, 1.5]
    line = timed("g", "w", [[1.1 * s] * 2 for s in swing], [[s] * 2 for s in swing], 1.02)

    assert line.ratios == pytest.approx({"minimum": 1.1, "median": 1.1})
    assert line.verdict == "missed"


def test_something_against_nothing_is_missed() -> None:
    assert counted("g", "w", 1, 0, 1.05).verdict == "missed"
    assert counted("g", "w", 0, 0, 1.05).verdict == "reached"


def test_saved_lines_hold_verdict_and_every_ratio(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save(
        [timed("g", "w", [[1.0], [1.2]], [[1.0], [1.0]], 1.02), counted("g", "n", 3, 3, None)],
        tmp_path,
        "bench",
        {"a": 1},
    )

    saved = json.loads((tmp_path / "bench.json").read_text())
    assert saved["a"] == 1
    assert saved["lines"][0]["data"]["paired_ratios"] == [1.0, 1.2]
    assert [line["verdict"] for line in saved["lines"]] == ["unclear", ""]
    assert (tmp_path / "bench.png").stat().st_size > 0
