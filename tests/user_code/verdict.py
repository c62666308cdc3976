"""What became of a case under a layout, beside what has to."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from tests.support.ranks import RankError, run_on_ranks
from tests.user_code.case import LAYOUTS, PIPELINES, Case, Degrees, degrees, num_data_ranks, num_ranks
from tests.user_code.measure import whole
from tests.user_code.training import Record, start, train

TIMEOUT = 150.0
"""Seconds for the trainings of one call, the start of processes included."""

PATIENCE = 25.0
"""Seconds that ranks may be later than the first: one that waits for ranks which are done never ends."""


@dataclass
class Outcome:
    """Of one case under one layout.

    Args:
        kind: "exact", "refused", "WRONG", "CRASH" or "HANG".
        text: the sentence, or what differs.
    """

    kind: str
    text: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}" if self.text else self.kind


@dataclass
class Numbers:
    """A record with whole tensors, of one rank; the losses are means over the data ranks."""

    losses: list[float | None]
    norms: list[dict[str, float]]
    logged: dict[str, float]
    logger: list[tuple[int, dict[str, float]]]
    seen: list[Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)


def outcomes(case: Case, layouts: Iterable[str]) -> dict[str, Outcome]:
    """Of a case under layouts, those with as many ranks in one go."""
    todo, found = list(layouts), {}
    while todo:
        ranks = num_ranks(todo[0])
        together = [layout for layout in todo if num_ranks(layout) == ranks]
        records = _on_ranks(case, ranks, together)
        if isinstance(records, Outcome) and len(together) > 1:  # which of them it was is lost
            together = together[:1]
            records = _on_ranks(case, ranks, together)
        if isinstance(records, Outcome):
            found[together[0]] = records
        else:
            for index, layout in enumerate(together[: len(records[0])]):
                found[layout] = _judge(case, layout, [of_rank[index] for of_rank in records])
        todo = [layout for layout in todo if layout not in found]
    return {layout: found[layout] for layout in layouts}


def fits(case: Case, layout: str, outcome: Outcome) -> bool:
    """Whether it is what the case has to give."""
    if layout in PIPELINES:
        from tests.user_code.cases import expected

        return outcome.kind == expected(case.name, layout)
    if layout not in case.refused:
        return outcome.kind == "exact"
    return outcome.kind == "refused" and re.search(case.refused[layout], outcome.text) is not None


def _on_ranks(case: Case, ranks: int, layouts: Sequence[str]) -> list[list[Record]] | Outcome:
    try:
        return run_on_ranks(ranks, train_under, case.name, tuple(layouts), timeout=TIMEOUT, patience=PATIENCE)
    except RankError as error:
        words = " ".join(str(answer[-1].error) for answer in error.answers.values() if answer and answer[-1].error)
        late = "gave no answer" in str(error)
        return Outcome("HANG" if late else "CRASH", words or str(error).splitlines()[0 if late else -1])


def train_under(name: str, layouts: Sequence[str]) -> list[Record]:
    """On a rank: the records under layouts, one after the other, up to the first that fails."""
    from tests.user_code.cases import CASES

    records: list[Record] = []
    for layout in layouts:
        records.append(train(CASES[name], layout))
        if records[-1].error:
            break  # the other ranks may wait for this one still: the rest is for a new group
    return records


def _judge(case: Case, layout: str, records: list[Record]) -> Outcome:
    errors = [record.error for record in records]
    if any(errors):
        return _failure(case, layout, records)
    reference = _reference(case, num_data_ranks(layout))
    for rank in range(len(records)):
        numbers = _numbers(records, rank, layout)
        _, data, tp = degrees(layout)
        if difference := _difference(numbers, reference[rank // tp % data * len(reference) // data], case):
            return Outcome("WRONG", f"rank {rank}: {difference}")
    return Outcome("exact")


def _failure(case: Case, layout: str, records: list[Record]) -> Outcome:
    told = [record.error for record in records if record.error]
    if len(told) < len(records):
        return Outcome("CRASH", f"on {len(told)} of {len(records)} ranks: {told[0]}")
    if not all(record.refuses for record in records):
        return Outcome("CRASH", next(record.error for record in records if not record.refuses))
    # under pp a step may be the first to take another path, after others have trained
    if layout not in PIPELINES and _has_moved(case, records):
        return Outcome("CRASH", f"after weights had changed: {told[0]}")
    return Outcome("refused", told[0].partition(": ")[2])


def _has_moved(case: Case, records: list[Record]) -> bool:
    """Whether what is refused has changed weights before."""
    for name, before in start(case).items():
        if all(name in record.tensors for record in records):
            now = whole([record.tensors[name] for record in records], 0)
            if now.shape != before.shape or not _is_close(now.double(), before.double(), 1e-6):
                return True
    return False


@functools.cache
def _reference_of(name: str, ddp_ranks: int) -> list[Numbers]:
    from tests.user_code.cases import CASES

    if ddp_ranks == 1:
        records = [train(CASES[name], None)]
    else:
        records = [answer[0] for answer in run_on_ranks(ddp_ranks, train_under, name, ("ddp",))]
    failed = [record.error for record in records if record.error]
    assert not failed, f"{name} fails by itself: {failed[0]}"
    numbers = [_numbers(records, rank, None) for rank in range(len(records))]
    # ddp logs each rank's own value: what is meant is their mean
    logged = _means([record.logged for record in records])
    logger = [(calls[0][0], _means([values for _, values in calls])) for calls in zip(*(r.logger for r in records))]  # noqa: B905
    return [replace(mine, logged=logged, logger=logger) for mine in numbers]


def _reference(case: Case, ranks: int) -> list[Numbers]:
    return _reference_of(case.name, ranks if case.like == "ddp" else 1)


def _numbers(records: list[Record], rank: int, layout: str | None) -> Numbers:
    record = records[rank]
    known = layout in LAYOUTS or layout in PIPELINES
    _, data, tp = degrees(str(layout)) if known else Degrees(1, len(records), 1)
    first = rank // (data * tp) * data * tp + rank % tp  # in its stage, with its part of layers
    alike = records[first : first + data * tp : tp]
    steps = [
        [other.gradients[i] for other in records if i < len(other.gradients)] for i in range(len(record.gradients))
    ]
    names = {name: None for other in records for name in other.tensors}
    return Numbers(
        [_mean(losses) for losses in zip(*(other.losses for other in alike), strict=False)],
        [
            {
                name: float(whole([gradients.get(name) for gradients in step], rank).norm())
                for name in {name: None for gradients in step for name in gradients}
                if name in step[rank] or layout in PIPELINES
            }
            for step in steps
        ],
        record.logged,
        record.logger,
        record.seen,
        {name: whole([other.tensors.get(name) for other in records], rank) for name in names},
    )


def _means(logged: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(values[name] for values in logged) / len(logged) for name in logged[0]}


def _mean(losses: Sequence[float | None]) -> float | None:
    there = [loss for loss in losses if loss is not None]
    return sum(there) / len(there) if there else None


def _difference(got: Numbers, want: Numbers, case: Case) -> str:
    """The first thing that differs, in words; empty if nothing does."""
    relative = case.tolerance
    pairs: list[tuple[str, Any, Any, float]] = [("number of losses", len(got.losses), len(want.losses), 0.0)]
    pairs += [(f"loss of step {i}", *both, relative) for i, both in enumerate(zip(got.losses, want.losses))]  # noqa: B905
    pairs += [("number of steps", len(got.norms), len(want.norms), 0.0)]
    for i, (mine, theirs) in enumerate(zip(got.norms, want.norms)):  # noqa: B905
        names = {**theirs, **mine}
        pairs += [(f"gradient of {n} in step {i}", mine.get(n, 0.0), theirs.get(n, 0.0), relative) for n in names]
    # Lightning keeps logged values in float32
    pairs += _pairs("logged", got.logged, want.logged)
    pairs += [("calls of the logger", len(got.logger), len(want.logger), 0.0)]
    for (step, mine), (_, theirs) in zip(got.logger, want.logger):  # noqa: B905
        pairs += _pairs(f"logger in step {step}:", mine, theirs)
    pairs += [("number of values seen", len(got.seen), len(want.seen), 0.0)]
    pairs += [(f"value seen {i}", *both, 1e-5) for i, both in enumerate(zip(got.seen, want.seen))]  # noqa: B905
    names = sorted({*got.tensors, *want.tensors})
    pairs += [(f"final {name}", got.tensors.get(name), want.tensors.get(name), relative) for name in names]
    for name, mine, theirs, tolerance in pairs:
        if not re.search(case.left_out, name) and not _is_close(mine, theirs, tolerance):
            return f"{name}: {_shown(mine)} / {_shown(theirs)}"
    return ""


def _pairs(what: str, got: dict[str, float], want: dict[str, float]) -> list[tuple[str, Any, Any, float]]:
    return [(f"{what} {name}", got.get(name), want.get(name), 1e-5) for name in {**want, **got}]


def _is_close(got: Any, want: Any, relative: float) -> bool:
    if isinstance(got, Tensor) and isinstance(want, Tensor):
        if got.shape != want.shape or got.dtype != want.dtype:
            return False
        if not got.is_floating_point() and not got.is_complex():
            return bool((got == want).all())
        return float((got - want).norm()) <= relative * max(float(want.norm()), 1e-3)
    if isinstance(got, float) and isinstance(want, (int, float)):
        both_nan = math.isnan(got) and math.isnan(want)
        return both_nan or math.isclose(got, want, rel_tol=relative, abs_tol=relative / 10)
    return bool(got == want)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        shape = "x".join(map(str, value.shape))
        return f"{value.double().norm():.6g} ({shape})" if not value.is_complex() else f"{value.norm():.6g} ({shape})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
