"""What people write around their networks gives one process's numbers, or is refused in a sentence."""

from __future__ import annotations

import functools

import pytest

from tests.user_code.case import LAYOUTS, PIPELINES, num_ranks
from tests.user_code.cases import CASES, ON_DEMAND, REFUSED_IN_PIPELINES, REFUSED_IN_SOME, THEMES, expected
from tests.user_code.verdict import Outcome, fits, outcomes


@functools.cache
def outcomes_of(name: str, ranks: int) -> dict[str, Outcome]:
    """Of the layouts of so many ranks, which share the starts of processes and one process's numbers."""
    return outcomes(CASES[name], [layout for layout in LAYOUTS if num_ranks(layout) == ranks])


def test_names_are_used_once() -> None:
    assert len(CASES) == sum(len(theme.CASES) for theme in THEMES)
    assert not (ON_DEMAND | REFUSED_IN_PIPELINES | REFUSED_IN_SOME.keys()) - CASES.keys()


@pytest.mark.parametrize("layout", [pytest.param(x, marks=[pytest.mark.slow] * (num_ranks(x) > 2)) for x in LAYOUTS])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ON_DEMAND)) for n in CASES])
def test_as_one_process_or_refused(name: str, layout: str) -> None:
    outcome = outcomes_of(name, num_ranks(layout))[layout]
    assert fits(CASES[name], layout, outcome), f"{LAYOUTS[layout]}: {outcome}"


@pytest.mark.parametrize("layout", [pytest.param(x, marks=[pytest.mark.slow] * (x != "p")) for x in PIPELINES])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ON_DEMAND)) for n in CASES])
def test_pipelines_as_one_process_or_refused(name: str, layout: str) -> None:
    outcome = outcomes(CASES[name], [layout])[layout]
    assert outcome.kind == expected(name, layout), f"{PIPELINES[layout]}: {outcome}"
