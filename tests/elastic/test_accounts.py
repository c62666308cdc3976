"""What a run that was started again says of its time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lightning_dist.elastic.accounts import PARTS, Accounts
from lightning_dist.elastic.accounts_picture import draw, line
from tests.elastic import runs


def _attempt(number: int, begin: float, step: int, fit: int = 0) -> list[dict[str, Any]]:
    """One that is up after a second, formed after two, has loaded after four, and takes a step in half a second."""
    times = {"start": 0, "up": 1, "formed": 2, "loaded": 4, "first_step": 4.5}
    return [
        {"event": name, "attempt": number, "time": begin + after, "fit": fit, "step": step}
        for name, after in times.items()
    ]


def _ended(number: int, time: float, step: int, last: float) -> dict[str, Any]:
    return {"event": "ended", "attempt": number, "time": time, "fit": 0, "step": step, "last": last}


LAST = {"fit": 0, "step": 40, "last": 150.5}
# 20 s in which 20 steps were taken, 5 of which the second attempt takes again; 20 s of the second
EVENTS = [*_attempt(0, 100, 0), _ended(0, 125, 20, 124.5), *_attempt(1, 126, 15)]


def test_useful_time_is_that_of_steps_that_were_kept() -> None:
    accounts = Accounts.of(EVENTS, 152.0, LAST)
    assert accounts is not None
    assert accounts.lost == 5
    assert accounts.seconds["train"] == pytest.approx(0.75 * 20 + 20)
    assert accounts.seconds["lost"] == pytest.approx(5)
    assert accounts.seconds["end"] == pytest.approx(0.5 + 1 + 1.5)
    assert {part: accounts.seconds[part] for part in ("start", "form", "load", "first step")} == pytest.approx(
        {"start": 2, "form": 2, "load": 4, "first step": 1}
    )
    assert accounts.useful == pytest.approx(35 / 52)
    assert str(accounts).startswith("67.3% of the run trained what was kept: 35.0 of 52.0 s in 2 attempts; 5 steps")


@pytest.mark.parametrize("until", ["start", "up", "formed", "loaded"])
def test_an_attempt_that_ends_before_its_first_step_trains_nothing(until: str) -> None:
    first = _attempt(0, 100, 0)
    begun = first[: 1 + next(i for i, event in enumerate(first) if event["event"] == until)]
    ended = {"event": "ended", "attempt": 0, "time": 110.0}
    accounts = Accounts.of([*begun, ended, *_attempt(1, 111, 0)], 126.0, {"fit": 0, "step": 9, "last": 125.5})
    assert accounts is not None
    assert accounts.lost == 0
    assert accounts.seconds["train"] == pytest.approx(10)
    assert sum(accounts.seconds.values()) == pytest.approx(26)


def test_the_parts_are_drawn_and_fill_the_line(tmp_path: Path) -> None:
    accounts = Accounts.of(EVENTS, 152.0, LAST)
    assert accounts is not None
    bar, legend = line(accounts, width=52).plain.split("\n")
    assert len(bar) == 52
    assert bar.count("█") == pytest.approx(35, abs=2)
    assert all(part in legend for part in PARTS)
    draw(accounts, tmp_path / "run.svg")
    picture = ElementTree.parse(tmp_path / "run.svg").getroot()
    bars = [rect for rect in picture if rect.find("{*}title") is not None]
    assert len(bars) == len(accounts.spans)
    rights = [float(rect.get("x", "0")) + float(rect.get("width", "0")) for rect in bars]
    assert max(rights) == pytest.approx(1180, abs=1)


@pytest.mark.slow
def test_a_run_that_was_started_again_tells_its_accounts(tmp_path: Path) -> None:
    kill = {"kind": "kill", "rank": 1, "when": "collective", "step": 6, "attempt": 0}
    options = {"layout": "dp_replicate=2", "ranks": 2, "steps": [12], "every": 4, "faults": [(0, kill)]}
    process = runs.start(tmp_path / "run", max_restarts=1, **options)
    text = runs.end(process, tmp_path / "run")
    assert process.returncode == 0, text
    told = re.search(r"([\d.]+)% of the run trained what was kept: [\d.]+ of [\d.]+ s in 2 attempts; 2 steps", text)
    assert told is not None, text
    assert 0 < float(told[1]) < 100
    assert "█ train" in text
