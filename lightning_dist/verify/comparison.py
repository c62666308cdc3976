"""Losses, gradient norms, weights, logged values and a validation of a layout beside those of one process."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from lightning_dist.doctor.parity import TINY, Difference
from lightning_dist.layout import Layout
from lightning_dist.verify.departure import Departure
from lightning_dist.verify.distances import SMALL, distance, largest_norm
from lightning_dist.verify.training import Pieces, Record

Values = dict[str, tuple[float, float]]
"""By what they are: of the layout, and of one process."""


@dataclass(frozen=True)
class Tolerance:
    """Relative differences that are rounding.

    Args:
        numbers: of losses, logged values and those of the validation; ten times that of gradients and buffers.
        weights: of weights after the last step, relative to how far they have moved. An optimizer divides gradients by
            their size, and so makes rounding of single entries larger.
    """

    numbers: float
    weights: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> Tolerance:
        """For what is computed in a dtype."""
        return _TOLERANCES.get(dtype, _COARSE)


_TOLERANCES = {torch.float64: Tolerance(1e-9, 1e-5), torch.float32: Tolerance(1e-4, 5e-2)}
_COARSE = Tolerance(5e-2, 0.5)


@dataclass
class Comparison:
    """Of one layout.

    Args:
        differences: the largest one of each kind.
        bounds: of each kind.
        values: side by side.
        first_batch: where losses or gradients differ first; None where none do.
        departure: of what was recorded in all steps: a weight's gradient, a weight, a buffer, a logged value; or after
            them, a value of the validation.
        stepped: where weights depart before any loss or gradient does, what the step of an optimizer did.
    """

    differences: dict[str, Difference] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    values: Values = field(default_factory=dict)
    first_batch: int | None = None
    departure: Departure | None = None
    stepped: Departure | None = None

    @property
    def wrong(self) -> list[Difference]:
        """Those that are no rounding."""
        return [d for kind, d in self.differences.items() if d.relative > self.bounds[kind]]


def compare(records: Sequence[Record], one: Record, layout: Layout, tolerance: Tolerance) -> Comparison:
    """The records of all ranks, in their order, beside that of one process on the same batches."""
    bounds = dict.fromkeys(("loss", "gradient norm", "logged values", "validation"), tolerance.numbers)
    bounds |= dict.fromkeys(("gradients", "buffers", "steps of weights"), 10 * tolerance.numbers)
    compared = Comparison(bounds={**bounds, "weights": tolerance.weights})
    _compare_losses(compared, records, one, layout)
    gradients = _compare_gradients(compared, records, one)
    compared.stepped = _first_step_apart(compared, records, one, tolerance)
    weights = _compare_weights(compared, records, one, tolerance)
    logged = _compare_logged(compared, records, one.logged)
    validated = None if one.validated is None else _compare_validation(compared, records, one)
    compared.departure = gradients or weights or logged or validated
    return compared


def _note(compared: Comparison, kind: str, relative: float, sentence: str, batch: int | None = None) -> None:
    before = compared.differences.get(kind, Difference(kind))
    compared.differences[kind] = before.larger(relative, sentence)
    if batch is not None and not relative <= compared.bounds[kind]:
        earlier = compared.first_batch
        compared.first_batch = batch if earlier is None else min(earlier, batch)


def _compare_losses(compared: Comparison, records: Sequence[Record], one: Record, layout: Layout) -> None:
    scale = max((abs(loss) for loss in one.losses.values() if math.isfinite(loss)), default=0.0)
    for batch, expected in one.losses.items():
        of_ranks: dict[int, list[float]] = {}
        for rank, record in enumerate(records):
            of_ranks.setdefault(layout.data_rank(rank), []).append(record.losses.get(batch, math.nan))
        loss = mean(mean(losses) for losses in of_ranks.values())
        compared.values[f"loss, step {batch + 1}"] = loss, expected
        spread = max(max(losses) - min(losses) for losses in of_ranks.values())
        told = f"the loss of step {batch + 1} is {loss:.8g}, of one process {expected:.8g}"
        if spread > abs(loss - expected):
            told = f"ranks that see the same samples have losses of step {batch + 1} that are {spread:.2e} apart"
        away = max(abs(loss - expected), spread) if loss == loss or expected == expected else 0.0
        _note(compared, "loss", away / max(abs(expected), 1e-3 * scale, TINY), told, batch)


def _compare_gradients(compared: Comparison, records: Sequence[Record], one: Record) -> Departure | None:
    """Norms of all, and of each weight's; what departs in the first step in which one does."""
    departure = None
    if (most := max(len(record.squares) for record in records)) > len(one.squares):
        told = f"the optimizers took {most} steps, of one process {len(one.squares)}"
        _note(compared, "gradient norm", math.inf, told)
    for step, pieces in enumerate(one.squares):
        of_ranks = [record.squares[step] for record in records if step < len(record.squares)]
        batch = one.batch_of[step]
        mine, expected = _norms(of_ranks), _norms([pieces])
        total, whole = (math.sqrt(sum(norm**2 for norm in norms.values())) for norms in (mine, expected))
        compared.values[f"gradient norm, step {step + 1}"] = total, whole
        told = f"the gradient norm of step {step + 1} is {total:.8g}, of one process {whole:.8g}"
        _note(compared, "gradient norm", abs(total - whole) / max(whole, TINY), told, batch)
        away = _of_each(of_ranks, mine, expected, SMALL * whole)
        for name, relative in away.items():
            told = f"the gradient of {name} in step {step + 1} has a norm of {mine.get(name, 0.0):.8g}, of one process "
            _note(compared, "gradients", relative, f"{told}{expected.get(name, 0.0):.8g}", batch)
        wrong = {name: r for name, r in away.items() if not r <= compared.bounds["gradients"]}
        if wrong and departure is None:
            departure = _told_gradients(step, wrong, mine, expected)
    return departure


def _norms(of_ranks: Sequence[Pieces]) -> dict[str, float]:
    """Of each weight, over all pieces, each once: as the mean of the ranks that hold it."""
    pieces: dict[str, dict[Any, list[float]]] = {}
    for held in of_ranks:
        for name, squares in held.items():
            for piece, square in squares.items():
                pieces.setdefault(name, {}).setdefault(piece, []).append(square)
    return {name: math.sqrt(sum(mean(held) for held in of.values())) for name, of in pieces.items()}


def _of_each(
    of_ranks: Sequence[Pieces], mine: Mapping[str, float], expected: Mapping[str, float], floor: float
) -> dict[str, float]:
    """Relative differences by weight, the last of the module first: of its norm, and between ranks with the same piece
    of its gradient.
    """
    found = {}
    for name in reversed([*expected, *(mine.keys() - expected.keys())]):
        norm = expected.get(name, 0.0)
        away = abs(mine.get(name, 0.0) - norm)
        held: dict[Any, list[float]] = {}
        for pieces in of_ranks:
            for piece, square in pieces.get(name, {}).items():
                held.setdefault(piece, []).append(math.sqrt(square))
        spread = max((max(norms) - min(norms) for norms in held.values()), default=0.0)
        found[name] = max(away, spread) / max(norm, floor, TINY)
    return found


def _told_gradients(
    step: int, wrong: Mapping[str, float], mine: Mapping[str, float], expected: Mapping[str, float]
) -> Departure:
    name, relative = next(iter(wrong.items()))
    factors = [mine.get(n, 0.0) / expected[n] for n in wrong if expected.get(n)]
    when = f"in step {step + 1}"
    if len(wrong) > 1 and factors and max(factors) - min(factors) <= 1e-6 * abs(factors[0]):
        which = f"of all {len(wrong)}" if len(wrong) == len(expected) else f"of {len(wrong)} of {len(expected)}"
        told = f"the gradients {which} weights are {factors[0]:.6g} times those of one process {when}: they are summed "
        return Departure("gradient norm", name, f"{told}or averaged over other ranks, or the loss is scaled", relative)
    away = f"its norm is {mine.get(name, 0.0):.8g}, of one process {expected.get(name, 0.0):.8g}"
    return Departure(
        "weight gradient", name, f"the gradient of {name} departs first, going backward, {when}: {away}", relative
    )


def _compare_weights(
    compared: Comparison, records: Sequence[Record], one: Record, tolerance: Tolerance
) -> Departure | None:
    expected: dict[str, Tensor] = one.load("weights")
    moves = _Moves(expected, one, tolerance)
    largest = largest_norm(expected[name] for name in expected.keys() & one.buffers)
    departures, seen = dict[str, Departure](), set[str]()
    for rank, record in enumerate(records):
        weights: dict[str, Tensor] = record.load("weights")
        seen |= weights.keys()
        for name in [name for name in expected if name in weights]:
            told = f"{name} after the last step is another on rank {rank} than in one process"
            if name in one.buffers:
                floor = 1e-3 * min(largest, math.sqrt(expected[name].numel()))
                found = {"buffers": distance(weights[name], expected[name], floor)}
                told, more = f"the buffer {told}", ""
            else:
                found, more = moves.apart(name, weights[name]), f": look at the optimizer{one.groups.get(name, '')}"
            for kind, relative in found.items():
                _note(compared, kind, relative, f"{told} (relative difference {relative:.1e})")
                if not relative <= compared.bounds[kind] and kind not in departures:
                    sentence = f"{told}, and no gradient departs{more}"
                    departures[kind] = Departure(_DEPARTS[kind], name, sentence, relative)
    if names := sorted(seen ^ expected.keys()):
        told = f"the weights are others than in one process: {', '.join(names[:3])}"
        _note(compared, "weights", math.inf, told)
        departures.setdefault("weights", Departure("weight", names[0], told, math.inf))
    return next((departures[kind] for kind in _DEPARTS if kind in departures), None)


_DEPARTS = {"weights": "weight", "steps of weights": "weight", "buffers": "buffer"}


class _Moves:
    """How far weights have moved in one process, and how far from there those of a layout are.

    Args:
        expected: the weights of one process.
        one: its record.
        tolerance: of numbers.
    """

    def __init__(self, expected: Mapping[str, Tensor], one: Record, tolerance: Tolerance) -> None:
        self._expected, self._start, self._tolerance = expected, one.load("start"), tolerance
        self._shares_of_entries: dict[str, Tensor] = one.load("shares")
        self._steps, self._shares = len(one.squares), _smallest_shares(one.squares)

    def apart(self, name: str, mine: Tensor) -> dict[str, float]:
        """By kind: the difference relative to the movement, and where its gradients say more than rounding, the median
        of those of the entries that move, in which the few whose gradients are rounding have no part.
        """
        whole, before = self._expected[name], self._start.get(name)
        share = self._shares.get(name)
        if share is not None and share <= self._tolerance.numbers / 10:
            return {"weights": 0.0}
        away = distance(mine, whole, 0.0)
        if not away or math.isinf(away) or before is None or before.shape != whole.shape:
            return {"weights": away}
        if share is None and not torch.equal(before, whole):  # by other code than the optimizer's, as a teacher follows
            return {"weights": away}
        apart, moved = (
            (a.double() - b.double()).nan_to_num(0.0, 0.0, 0.0) for a, b in ((mine, whole), (whole, before))
        )
        entries = self._shares_of_entries.get(name)
        if entries is not None:  # as those of keys in a packed bias
            apart = apart.where(entries.reshape(apart.shape) > self._tolerance.numbers / 10, 0.0)
        return self._relative(apart, moved, largest_norm([before]) * torch.finfo(whole.dtype).eps, share or 1.0)

    def _relative(self, apart: Tensor, moved: Tensor, rounding: float, share: float) -> dict[str, float]:
        """Beside movements that are more than what a weight's dtype rounds off in each step."""
        rounded = self._steps * rounding
        size = max(float(moved.norm()), rounded / self._tolerance.weights, TINY)
        moving = apart[(moved != 0) | (apart != 0)].abs()
        typical = float(moving.median()) * math.sqrt(moving.numel()) if moving.numel() else 0.0
        size_of_typical = max(float(moved.norm()), rounded / (10 * self._tolerance.numbers), TINY)
        heard = min(1.0, share / (10 * self._tolerance.numbers))
        return {"weights": float(apart.norm()) / size, "steps of weights": typical / size_of_typical * heard}


def _first_step_apart(
    compared: Comparison, records: Sequence[Record], one: Record, tolerance: Tolerance
) -> Departure | None:
    """The first step of an optimizer, before any loss or gradient departs, after which weights are elsewhere."""
    shares, sizes = _smallest_shares(one.squares), _norms([one.start])
    bound, eps = min(tolerance.weights, 100 * tolerance.numbers), torch.finfo(one.coarsest).eps
    for step in range(1, min(len(record.moved) for record in (one, *records))):
        if compared.first_batch is not None and compared.first_batch <= one.batch_of[step - 1]:
            return None
        mine, expected = _norms([record.moved[step] for record in records]), _norms([one.moved[step]])
        for name, moved in expected.items():
            is_rounding = shares.get(name, 1.0) <= tolerance.numbers / 10
            if is_rounding or (moved and name not in shares):  # that other code than the optimizer's moves
                continue
            away = abs(mine.get(name, 0.0) - moved)
            relative = away / max(moved, step * eps * sizes[name] / bound, TINY)
            if not relative <= bound:
                told = f"the weights after step {step} depart, though its gradients do not: look at the optimizer, its "
                told += f"groups, clipping or the scheduler; {name}{one.groups.get(name, '')} has moved by "
                return Departure(
                    "weight", name, f"{told}{mine.get(name, 0.0):.6g}, of one process by {moved:.6g}", relative
                )
    return None


def _smallest_shares(steps: Iterable[Pieces]) -> dict[str, float]:
    """The norm of each weight's gradient beside that of all, in the step where it is smallest; but zero."""
    smallest: dict[str, float] = {}
    for pieces in steps:
        norms = _norms([pieces])
        whole = math.sqrt(sum(norm**2 for norm in norms.values())) or 1.0
        for name, norm in norms.items():
            smallest[name] = min(smallest.get(name, math.inf), norm / whole or math.inf)
    return {name: 1.0 if share == math.inf else share for name, share in smallest.items()}


def _apart(value: float, other: float, floor: float) -> float:
    """The relative difference of numbers; infinite where one is none, or no number."""
    if value == other or (value != value and other != other):
        return 0.0
    away = abs(value - other) / max(abs(other), floor, TINY)
    return away if math.isfinite(away) else math.inf


Logged = Mapping[str, Mapping[int, float]]


def _compare_logged(compared: Comparison, records: Sequence[Record], expected: Logged) -> Departure | None:
    """On rank 0 all that is logged; on others, which may log less, what they do."""
    found = list[Departure]()
    for rank, record in enumerate(records):
        mine = record.logged
        names = [name for name in expected if rank == 0 or name in mine]
        for name in [*names, *(mine.keys() - expected.keys() if rank == 0 else ())]:
            found += _compare_logged_value(compared, rank, name, mine.get(name, {}), expected.get(name, {}))
    return found[0] if found else None


def _compare_logged_value(
    compared: Comparison, rank: int, name: str, mine: Mapping[int, float], expected: Mapping[int, float]
) -> list[Departure]:
    found, on_rank = list[Departure](), f" on rank {rank}" if rank else ""
    scale = max((abs(value) for value in expected.values() if math.isfinite(value)), default=0.0)
    for step in sorted(expected.keys() | mine.keys() if rank == 0 else expected.keys() & mine.keys()):
        value, other = mine.get(step, math.nan), expected.get(step, math.nan)
        relative = _apart(value, other, 1e-3 * scale)
        told = f"the logged {name} (step {step}) is {value:.8g}{on_rank}, of one process {other:.8g}"
        _note(compared, "logged values", relative, told)
        if not relative <= compared.bounds["logged values"]:
            found.append(Departure("logged value", name, told, relative))
    if expected and rank == 0:
        last = max(expected)
        compared.values[f"{name}"] = mine.get(last, math.nan), expected[last]
    return found


def _compare_validation(compared: Comparison, records: Sequence[Record], one: Record) -> Departure | None:
    """What was logged over all batches, on each rank; and whether weights that one process leaves alone are changed."""
    found, expected = list[Departure](), one.validated or {}
    scale = max((abs(value) for value in expected.values() if math.isfinite(value)), default=0.0)
    floor = 1e-3 * min(1.0, scale)  # one that counts samples hides no loss
    for rank, record in enumerate(records):
        mine = record.validated or {}
        for name in [*expected, *(mine.keys() - expected.keys())]:
            value, other = mine.get(name, math.nan), expected.get(name, math.nan)
            relative = _apart(value, other, floor)
            on_rank = f" on rank {rank}" if rank else ""
            told = f"the validation's {name} is {value:.8g}{on_rank}, of one process {other:.8g}"
            compared.values.setdefault(f"validation, {name}", (value, other))
            found += _note_validation(compared, name, relative, told)
    changed: dict[str, Tensor] = one.load("changed")
    for rank, record in enumerate(records):
        here: dict[str, Tensor] = record.load("changed")
        held: dict[str, Tensor] = record.load("weights")
        for name in sorted(here.keys() | (changed.keys() & held.keys())):
            in_both = name in here and name in changed
            relative = distance(here[name], changed[name], 0.0) if in_both else math.inf
            verb = "sets another" if in_both else "changes" if name in here else "leaves alone"
            told = f"the validation {verb} {name} on rank {rank}, unlike in one process"
            found += _note_validation(compared, name, relative, told)
    return found[0] if found else None


def _note_validation(compared: Comparison, name: str, relative: float, told: str) -> list[Departure]:
    """What departs, if it does."""
    _note(compared, "validation", relative, told)
    is_rounding = relative <= compared.bounds["validation"]
    return [] if is_rounding else [Departure("validation value", name, told, relative)]


def note_batches(compared: Comparison, given: Sequence[int], own: Sequence[int]) -> None:
    """Whether the ranks together were given as many batches of the validation, by loader, as one process has."""
    for index, expected in enumerate(own):
        number = given[index] if index < len(given) else 0
        if number < expected:
            which = f" of loader {index + 1}" if len(own) > 1 else ""
            told = f"the ranks validated on {number} batches{which}, one process on {expected}"
            departures = _note_validation(compared, "validation batches", 1 - number / expected, told)
            compared.departure = compared.departure or departures[0]


def note_alike(compared: Comparison, told: str) -> None:
    """That data ranks were given the same, of which the numbers of one process on their batches know nothing."""
    compared.bounds["batches"] = 0.0
    _note(compared, "batches", math.inf, told)
    compared.departure = Departure("batch", told.partition(" are")[0], told, math.inf)
