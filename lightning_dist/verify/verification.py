"""A user's module under layouts, beside one process: each training in fresh ranks, on the same batches."""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_dist.doctor.parity import Difference
from lightning_dist.doctor.ranks import run_ranks
from lightning_dist.doctor.results import CheckFailed
from lightning_dist.doctor.settings import Settings, usable_accelerators
from lightning_dist.layout import REST, Layout
from lightning_dist.verify.batches import Recorded, interleaved, joined, told_alike
from lightning_dist.verify.comparison import Comparison, Tolerance, compare, note_alike, note_batches
from lightning_dist.verify.departure import Departure, first_departure
from lightning_dist.verify.results import LayoutResult, Verification
from lightning_dist.verify.training import Job, Record, train, validate_trainer

_PATIENCE = 3.0
"""Seconds that ranks get to say what they met after one has failed."""
_NAMED = 5
"""Names of dropout that are told."""


def verify(
    make_module: Callable[[], pl.LightningModule],
    make_data: Callable[[], Any] | None = None,
    layouts: Iterable[str | Layout | Mapping[str, int]] = (),
    *,
    steps: int = 4,
    validation_batches: int = 5,
    seed: int = 0,
    precision: Any = "64-true",
    tolerance: float | None = None,
    accelerator: str = "auto",
    timeout: float = 300.0,
    trainer: Mapping[str, Any] | None = None,
    strategy: Mapping[str, Any] | None = None,
    on_begin: Callable[[Verification, str], None] = lambda found, layout: None,
) -> Verification:
    """Trains a module for some steps in one process and under layouts, on the same batches, validates it where it has a
    ``validation_step`` and a loader for it, and compares.

    Ranks are processes on this machine, on accelerators where there are enough for every layout, else on the CPU; all
    have ended when this returns. Dropout is switched off. A script that calls this needs
    ``if __name__ == "__main__":``, as for any use of multiprocessing.

    Args:
        make_module: makes the LightningModule; in every process, so it can be pickled (a function at the top of a
            module, a class, a partial of one).
        make_data: makes a LightningDataModule, or a loader; likewise. None for the module's own loaders.
        layouts: degrees by axis, such as ``"dp_shard=2,tp=2"``.
        steps: of the optimizer.
        validation_batches: of each validation loader, after the steps; 0 for none. Ranks share them, so a number that
            no number of ranks divides lets some run out before others.
        seed: before the module is made.
        precision: of the Trainer. ``"64-true"`` tells rounding from a fault best.
        tolerance: relative difference that is rounding; by default that of the coarsest dtype in which something that
            depends on parameters is computed.
        accelerator: ``"auto"`` or ``"cpu"``.
        timeout: seconds for each training.
        trainer, strategy: more arguments of the Trainer, such as ``accumulate_grad_batches``, and of HybridStrategy.
        on_begin: called before each layout, with what was found so far and its name.

    Raises:
        ValueError: a layout that is none; an argument of the Trainer that is set here; a module that does not train in
            one process.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; there is nothing to compare without one")
    if validation_batches < 0:
        raise ValueError(f"validation_batches is {validation_batches}; give how many there are to be, or 0 for none")
    asked = [layout if isinstance(layout, str) else _resolved(layout) for layout in layouts]
    named = {str(layout): _resolved(layout) for layout in asked}
    if not named:
        raise ValueError("there are no layouts to compare with one process; give some, such as dp_shard=2")
    validate_trainer(trainer or {})
    _validate_pickled(make_module, make_data)
    device_type = _device_type(accelerator, max(layout.world_size for layout in named.values()))
    with tempfile.TemporaryDirectory(prefix="lightning_dist-verify-") as folder:
        more = dict(trainer or {}), dict(strategy or {})
        job = Job(make_module, make_data, None, steps, seed, precision, device_type, *more, Path(folder))
        job = replace(job, validation_batches=validation_batches)
        run = _Run(job, timeout, tolerance)
        num_validation = sum(run.own_batches.num_validation)
        found = Verification(
            steps, str(precision), run.tolerance.numbers, run.notes(), validation_batches=num_validation
        )
        for name, layout in named.items():
            on_begin(found, name)
            found.results.append(run.result(name, layout))
    return found


def _resolved(layout: Any) -> Layout:
    asked = Layout.parse(layout)
    if asked is None or REST in dict(asked.items()).values():
        raise ValueError(f"layout {str(layout)!r} takes as many ranks as there are; give every axis a degree")
    return asked


def _validate_pickled(*made: Any) -> None:
    try:
        pickle.dumps(made)
    except Exception as error:
        raise ValueError(
            f"what makes the module or its data can't be handed to other processes ({error}); give a function at the "
            "top of a module, a class, or a functools.partial of one"
        ) from None


def _device_type(accelerator: str, num_ranks: int) -> str:
    if accelerator not in ("auto", "cpu"):
        raise ValueError(f"accelerator is {accelerator!r}; choose auto or cpu")
    device_type, count = usable_accelerators()
    return device_type if accelerator == "auto" and count >= num_ranks else "cpu"


@dataclass
class _Run:
    """Trainings, with those of one process that have been.

    Args:
        job: of one process, with the module's own data.
        timeout: seconds for each.
        given: the tolerance that the user wants.
    """

    job: Job
    timeout: float
    given: float | None
    _references: list[tuple[Recorded, Record]] = field(default_factory=list)
    _folders: int = 0

    def __post_init__(self) -> None:
        try:
            self.own = self._train(self.job)[0]
        except CheckFailed as failed:
            raise ValueError(failed.reason) from None
        if not any(self.own.squares):
            raise ValueError("no step of the module in one process has gradients, so there is nothing to compare")
        self.own_batches: Recorded = self.own.load("batches")
        self._references.append((self.own_batches, self.own))

    @property
    def tolerance(self) -> Tolerance:
        """Of the dtype that was seen in one process."""
        tolerance = Tolerance.of(self.own.coarsest)
        return tolerance if self.given is None else Tolerance(self.given, max(self.given, tolerance.weights))

    def notes(self) -> list[str]:
        """What a reader has to know."""
        notes, dropouts = [], sorted(self.own.dropouts)
        if dropouts:
            more = f" and {len(dropouts) - _NAMED} more" if len(dropouts) > _NAMED else ""
            notes.append(f"dropout was switched off in both ({', '.join(dropouts[:_NAMED])}{more})")
        notes += sorted(self.own.notes)
        if self.own.draws:
            notes.append("the steps draw random numbers, of which ranks draw others than one process")
        if self.own.coarsest != torch.float64 and "64" in str(self.job.precision):
            notes.append(f"something computes in {self.own.coarsest} for itself, whose rounding is taken for rounding")
        if self.job.device_type != "cpu":
            notes.append(f"ranks were on {self.job.device_type}")
        return notes

    def result(self, name: str, layout: Layout) -> LayoutResult:
        """Of a layout; what fails is a result too."""
        begin = time.monotonic()
        try:
            found = self._compared(name, layout)
        except _Refused as error:
            found = LayoutResult(name, "refused", str(error))
        except CheckFailed as failed:
            found = _failed(name, failed)
        return replace(found, seconds=round(time.monotonic() - begin, 2))

    def _compared(self, name: str, layout: Layout) -> LayoutResult:
        records = self._train(replace(self.job, layout=layout))
        batches = self._joined(records, layout)
        one = self._reference(batches)
        compared = compare(records, one, layout, self.tolerance)
        note_batches(compared, batches.num_validation, self.own_batches.num_validation)
        for told in batches.alike:
            note_alike(compared, told)
        num_data_ranks = layout.num_data_ranks
        differences = {kind: d.relative for kind, d in compared.differences.items()}
        if not compared.wrong:
            worst = max(differences.values(), default=0.0)
            validated = "" if one.validated is None else ", and its validation"
            told = f"losses, gradients, weights and logged values of one process{validated}; "
            told += f"largest difference {worst:.1e}"
            return LayoutResult(name, "same", told, num_data_ranks, differences, compared.values)
        departure = self._departure(layout, compared)
        told = "; ".join(part for part in (departure and departure.sentence, _told(compared, departure)) if part)
        return LayoutResult(name, "differs", told, num_data_ranks, differences, compared.values, departure)

    def _departure(self, layout: Layout, compared: Comparison) -> Departure | None:
        """The first module; where no activation departs, or none can be looked at, what the comparison found."""
        if compared.first_batch is None or compared.stepped is not None:
            return compared.stepped or compared.departure
        looking = replace(self.job, layout=layout, looked_at=compared.first_batch, validation_batches=0)
        try:
            records = self._train(looking)
            path = self._saved(self._joined(records, layout))
            (one,) = self._train(replace(looking, layout=None, batches=path))
        except (CheckFailed, _Refused):
            return compared.departure
        activations = [record.load("activations") for record in records]
        bound = 10 * self.tolerance.numbers
        return first_departure(one.load("activations"), activations, layout, bound) or compared.departure

    def _joined(self, records: list[Record], layout: Layout) -> Recorded:
        of_data: dict[int, Recorded] = {}
        for rank, record in enumerate(records):
            if layout.data_rank(rank) not in of_data:
                of_data[layout.data_rank(rank)] = record.load("batches")
        if not all(recorded.batches for recorded in of_data.values()):
            raise _Refused("a data rank was given no batch, so there is nothing to compare; give more data")
        of_ranks = [recorded for _, recorded in sorted(of_data.items(), key=lambda pair: pair[0])]
        try:
            training = joined(of_ranks, self.job.strategy.get("batch_split"))
        except ValueError as error:
            raise _Refused(str(error)) from None
        alike = told_alike(of_ranks, self.own_batches)
        return replace(training, validation=interleaved(of_ranks, self.own_batches.num_validation), alike=alike)

    def _reference(self, batches: Recorded) -> Record:
        for known, record in self._references:
            if known.is_like(batches):
                return record
        try:
            (record,) = self._train(replace(self.job, batches=self._saved(batches)))
        except CheckFailed as failed:
            raise CheckFailed(f"on the batches of the data ranks, joined: {failed.reason}", failed.details) from None
        self._references.append((batches, record))
        return record

    def _saved(self, batches: Recorded) -> Path:
        path = self._folder() / "batches.pt"
        torch.save(batches, path)
        return path

    def _train(self, job: Job) -> list[Record]:
        num_ranks = 1 if job.layout is None else job.layout.world_size
        folder = self._folder()
        settings = Settings(num_ranks, job.device_type, self.timeout, folder, patience=_PATIENCE)
        together = job.layout is not None
        return run_ranks(settings, train, replace(job, folder=folder), together=together)

    def _folder(self) -> Path:
        self._folders += 1
        folder = self.job.folder / str(self._folders)
        folder.mkdir()
        return folder


class _Refused(Exception):
    """A layout that can't be compared; the message says why."""


def _failed(name: str, failed: CheckFailed) -> LayoutResult:
    if failed.details.get("refused"):
        return LayoutResult(name, "refused", failed.reason)
    trace = failed.details.get("traces", {}).get(f"rank {failed.details.get('rank')}", "")
    return LayoutResult(name, "failed", failed.reason, trace=_whole_lines(trace))


def _whole_lines(trace: str) -> str:
    """A traceback, of which the beginning may be cut off."""
    return trace if trace.startswith("Traceback") else trace.partition("\n")[2]


def _told(compared: Comparison, departure: Departure | None) -> str:
    """The first number that differs, and the buffer that differs most, which no weight hides; unless they depart."""
    first, *others = compared.wrong
    told = [first, *(wrong for wrong in others if wrong.kind == "buffers")]
    known = "" if departure is None else departure.sentence
    return "; ".join(_with_size(wrong) for wrong in told if not known.startswith(wrong.sentence))


def _with_size(wrong: Difference) -> str:
    size = f"(relative difference {wrong.relative:.1e})"
    return wrong.sentence if wrong.sentence.endswith(size) else f"{wrong.sentence} {size}"
