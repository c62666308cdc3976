"""Prints the table of cases and layouts: ``python -m tests.user_code [case ...] [--layouts s,t]``."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings

import torch

from tests.support.ranks import POOL
from tests.user_code.case import LAYOUTS, PIPELINES
from tests.user_code.cases import CASES, ON_DEMAND, expected
from tests.user_code.verdict import Outcome, fits, outcomes


def main() -> None:
    """One line a case; what is not as it has to be follows below the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.user_code", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="case", help="by default all")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="by default %(default)s")
    parser.add_argument("--times", action="store_true", help="print the seconds of each case")
    parser.add_argument("--quick", action="store_true", help="without those that `pytest -m slow` adds")
    parser.add_argument("--expected", action="store_true", help="print what has to come of each case, and run nothing")
    arguments = parser.parse_args()
    layouts = arguments.layouts.split(",")
    if unknown := [name for name in arguments.cases if name not in CASES]:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    if arguments.expected:
        print(expected_table())
        return
    _be_quiet()
    print(f"| case | {' | '.join(layouts)} |\n|---|{'---|' * len(layouts)}", flush=True)
    unexpected: list[str] = []
    for name in arguments.cases or [name for name in CASES if not (arguments.quick and name in ON_DEMAND)]:
        begun = time.monotonic()
        found = outcomes(CASES[name], layouts)
        cells = [_cell(name, layout, outcome) for layout, outcome in found.items()]
        took = f" {time.monotonic() - begun:.1f} s" if arguments.times else ""
        print(f"| {name} | {' | '.join(cells)} |{took}", flush=True)
        unexpected += [f"- {name}, {layout}: {o}" for layout, o in found.items() if not fits(CASES[name], layout, o)]
    print("\nOther than expected:\n" + "\n".join(unexpected) if unexpected else "\nAll as expected.")
    POOL.close()
    sys.exit(bool(unexpected))


def expected_table() -> str:
    """What the tests assert, in Markdown."""
    layouts = [*LAYOUTS, *PIPELINES]
    rows = [f"| case | {' | '.join(layouts)} | |", f"|---|{'---|' * len(layouts)}---|"]
    for case in CASES.values():
        cells = [expected(case.name, layout) for layout in layouts]
        rows.append(f"| {case.name} | {' | '.join(cells)} | {case.note} |")
    return "\n".join(rows)


def _cell(name: str, layout: str, outcome: Outcome) -> str:
    shown = outcome.kind if outcome.kind != "refused" else f"refused: {outcome.text}"
    return shown if fits(CASES[name], layout, outcome) else f"**{outcome.kind}**"


def _be_quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
