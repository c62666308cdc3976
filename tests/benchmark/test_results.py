"""Ratios, verdicts, and what is written."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.benchmark.results import Line, Record, counted, timed


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


LINE = timed("g", "w", [[1.0], [1.2]], [[1.0], [1.0]], 1.02)


def test_the_file_holds_verdict_and_every_ratio(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    record = Record(tmp_path, "bench", {"a": 1})
    record.extend([LINE, counted("g", "n", 3, 3, None)])
    record.close(finished=True)

    saved = json.loads((tmp_path / "bench.json").read_text())
    assert (saved["a"], saved["finished"]) == (1, True)
    assert saved["lines"][0]["data"]["paired_ratios"] == [1.0, 1.2]
    assert [line["verdict"] for line in saved["lines"]] == ["unclear", ""]
    assert (tmp_path / "bench.png").stat().st_size > 0


def test_each_line_is_printed_and_in_the_file_before_the_next_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured() -> Iterator[Line]:
        for number in range(3):
            yield counted("g", f"line {number}", number, 3, None)
            assert f"line {number}: {number} against 3" in capsys.readouterr().out
            saved = json.loads((tmp_path / "bench.json").read_text())
            assert [line["what"] for line in saved["lines"]] == [f"line {n}" for n in range(number + 1)]
            assert not saved["finished"]
        raise KeyboardInterrupt

    record = Record(tmp_path, "bench", {})
    with pytest.raises(KeyboardInterrupt):
        record.extend(measured())
    assert len(record.lines) == 3


def test_a_rank_goes_on_with_the_lines_of_the_process_that_started_it(tmp_path: Path) -> None:
    record = Record(tmp_path, "bench", {})
    record.add(LINE)
    pickle.loads(pickle.dumps(record)).add(counted("g", "n", 3, 3, None))
    assert [line.what for line in record.lines] == ["w", "n"]
    assert record.lines[0] == LINE


def test_a_new_record_forgets_an_earlier_run(tmp_path: Path) -> None:
    Record(tmp_path, "bench", {}).add(LINE)
    assert Record(tmp_path, "bench", {}).lines == []
