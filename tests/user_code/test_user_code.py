"""What people write around their networks gives one process's numbers, or is refused in a sentence."""

from __future__ import annotations

import functools

import pytest

from tests.support.parity import slow
from tests.user_code.case import LAYOUTS, PIPELINES, num_ranks
from tests.user_code.cases import CASES, ON_DEMAND, REFUSED_IN_PIPELINES, REFUSED_IN_SOME, THEMES, expected
from tests.user_code.verdict import Outcome, fits, outcomes

pytestmark = pytest.mark.sampled


@functools.cache
def by_default(name: str) -> list[str]:
    """Layouts of two ranks: all that refuse the case and, for every second case, in turn one of the others."""
    refused, exact = [], []
    for layout in (x for x in (*LAYOUTS, "p") if num_ranks(x) == 2 and name not in ON_DEMAND):
        (refused if expected(name, layout) == "refused" else exact).append(layout)
    number, shows = divmod(list(CASES).index(name), 2)
    turn = number % max(len(exact), 1)
    return refused + exact[turn : turn + shows]


@functools.cache
def outcomes_of(name: str, ranks: int, quick: bool) -> dict[str, Outcome]:
    """Of layouts that are run together: they share the starts of processes and one process's numbers."""
    together = [x for x in LAYOUTS if num_ranks(x) == ranks and (x in by_default(name)) == quick]
    return outcomes(CASES[name], together)


def test_names_are_used_once() -> None:
    assert len(CASES) == sum(len(theme.CASES) for theme in THEMES)
    assert not (ON_DEMAND | REFUSED_IN_PIPELINES | REFUSED_IN_SOME.keys()) - CASES.keys()


@pytest.mark.parametrize(
    ("name", "layout"), [(pytest.param if x in by_default(n) else slow)(n, x) for n in CASES for x in LAYOUTS]
)
def test_as_one_process_or_refused(name: str, layout: str) -> None:
    outcome = outcomes_of(name, num_ranks(layout), layout in by_default(name))[layout]
    assert fits(CASES[name], layout, outcome), f"{LAYOUTS[layout]}: {outcome}"


@pytest.mark.parametrize(
    ("name", "layout"), [(pytest.param if x in by_default(n) else slow)(n, x) for n in CASES for x in PIPELINES]
)
def test_pipelines_as_one_process_or_refused(name: str, layout: str) -> None:
    outcome = outcomes(CASES[name], [layout])[layout]
    assert outcome.kind == expected(name, layout), f"{PIPELINES[layout]}: {outcome}"
