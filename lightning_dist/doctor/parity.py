"""Trainings under layouts against the same training in one process on the CPU, all in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from lightning_dist.doctor.networks import NETWORKS
from lightning_dist.doctor.ranks import run_ranks
from lightning_dist.doctor.results import CheckFailed, CheckSkipped, Finding
from lightning_dist.doctor.settings import Settings
from lightning_dist.doctor.training import Job, Record, train

BOUND = 1e-9
"""Relative difference that rounding in float64 may make: on CPUs 1e-14 was seen; float32 anywhere would make 1e-7."""


TINY = 1e-300
"""Instead of zero, where it would divide."""


class References:
    """Trainings of one process on the CPU, by Lightning's own strategy; each is run once.

    Args:
        settings: of the examination. Its fault is of ranks, and this is none.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = replace(settings, fault=None)
        self._records: dict[str, Record] = {}

    def of(self, network: str) -> Record:
        """What the training of a network gives."""
        if network not in self._records:
            job = Job(network, self._settings, None, "cpu")
            self._records[network] = run_ranks(self._settings, train, job, num_ranks=1, together=False)[0]
        return self._records[network]


@dataclass(frozen=True)
class Difference:
    """The largest relative difference of one kind of number.

    Args:
        kind: of number.
        relative: to the number of one process.
        sentence: which numbers they are.
    """

    kind: str
    relative: float = 0.0
    sentence: str = ""

    def larger(self, relative: float, sentence: str) -> Difference:
        """This one, or another if that is larger; what is not a number is."""
        relative = math.inf if math.isnan(relative) else relative
        return Difference(self.kind, relative, sentence) if relative > self.relative else self


def check_alone(settings: Settings, references: References) -> Finding:
    """Each rank trains both networks alone on its device: what differs is a device that computes wrongly."""
    worst = 0.0
    for network in NETWORKS:
        job = Job(network, settings, None, settings.device_type)
        for rank, record in enumerate(run_ranks(settings, train, job)):
            differences = compare([record], references.of(network))
            worst = max(worst, differences[0].relative)
            _refuse(f"rank {rank} computes wrongly, {network} alone on its device", differences)
    return Finding(f"every rank alone has the numbers of one process on the CPU, {_within(worst)}")


def check_layout(settings: Settings, references: References, layout: str) -> Finding:
    """Losses, gradient norms and final weights of both networks, on every rank."""
    worst, details = 0.0, {}
    for network in NETWORKS:
        records = run_ranks(settings, train, Job(network, settings, layout, settings.device_type))
        differences = compare(records, references.of(network))
        _refuse(f"{network} under {layout}", differences)
        details[network] = {d.kind: d.relative for d in differences}
        worst = max(worst, differences[0].relative)
    return Finding(f"losses, gradient norms and weights of one process, {_within(worst)}", details)


def skip_layouts(settings: Settings) -> Finding:
    """In place of the layouts where there are none."""
    raise CheckSkipped(
        f"{settings.num_ranks} rank divides nothing; pass --accelerator cpu, or --devices on a machine with more"
    )


def assert_resumed(what: str, records: list[Record], reference: Record) -> float:
    """The largest difference of what was trained after a checkpoint.

    Raises:
        CheckFailed: it is larger than rounding.
    """
    differences = compare(records, reference)
    _refuse(what, differences)
    return differences[0].relative


def compare(records: list[Record], one: Record) -> list[Difference]:
    """The differences of ranks and one process, the largest first: the loss, the norm and the weights.

    Args:
        records: of all ranks of a training, or of one that trained alone.
        one: of one process.
    """
    found = [_of_ranks(records), _of_losses(records, one), _of_norms(records, one), _of_weights(records, one)]
    return sorted(found, key=lambda difference: -difference.relative)


def _of_ranks(records: list[Record]) -> Difference:
    """Ranks that see the same samples have the same losses."""
    worst = Difference("loss, between ranks of the same samples")
    for step in records[0].losses:
        firsts: dict[int, int] = {}
        for rank, record in enumerate(records):
            first = firsts.setdefault(record.data_rank, rank)
            here, there = record.losses[step], records[first].losses[step]
            ranks = f"ranks {first} and {rank}, which see the same samples,"
            worst = worst.larger(
                _relative(here, there), f"{ranks} have losses of {there:.6g} and {here:.6g} in step {step}"
            )
    return worst


def _of_losses(records: list[Record], one: Record) -> Difference:
    worst = Difference("loss")
    of_data_ranks = {record.data_rank: record for record in records}.values()
    for step in records[0].losses:
        loss = mean(record.losses[step] for record in of_data_ranks)
        sentence = f"the loss of step {step} is {loss:.6g}, of one process {one.losses[step]:.6g}"
        worst = worst.larger(_relative(loss, one.losses[step]), sentence)
    return worst


def _of_norms(records: list[Record], one: Record) -> Difference:
    worst = Difference("gradient norm")
    for step in records[0].squares:
        norm, of_one = _norm(records, step), _norm([one], step)
        sentence = f"the gradient norm of step {step} is {norm:.6g}, of one process {of_one:.6g}"
        worst = worst.larger(_relative(norm, of_one), sentence)
    return worst


def _norm(records: list[Record], step: int) -> float:
    """Over all pieces of gradients, each once: as the mean of the ranks that hold it."""
    pieces: dict[Any, list[float]] = {}
    for record in records:
        for piece, squares in record.squares[step].items():
            pieces.setdefault(piece, []).append(squares)
    return math.sqrt(sum(mean(held) for held in pieces.values()))


def _of_weights(records: list[Record], one: Record) -> Difference:
    worst = Difference("final weights")
    for rank, record in enumerate(records):
        if names := sorted(record.weights.keys() ^ one.weights.keys()):
            return worst.larger(math.inf, f"rank {rank} has other names of weights: {', '.join(names[:3])}")
        for name, weight in record.weights.items():
            away = float((weight - one.weights[name]).norm() / one.weights[name].norm().clamp(min=TINY))
            worst = worst.larger(away, f"{name} on rank {rank} is not that of one process after the last step")
    return worst


def _relative(value: float, other: float) -> float:
    return abs(value - other) / max(abs(other), TINY)


def _refuse(what: str, differences: list[Difference]) -> None:
    wrong = [d for d in differences if d.relative > BOUND]
    if wrong:
        told = next((d for d in wrong if d.kind.startswith("loss")), wrong[0])
        raise CheckFailed(
            f"{what}: {told.sentence} (relative difference {told.relative:.1e}, bound {BOUND:g})",
            {"differences": {d.kind: {"relative": d.relative, "largest": d.sentence} for d in differences}},
        )


def _within(relative: float) -> str:
    return f"largest relative difference {relative:.1e}, bound {BOUND:g}"
