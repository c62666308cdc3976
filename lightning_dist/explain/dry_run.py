"""Steps of a fit on one rank, with nothing computed and nobody to talk to: what the rank would hold at its peak."""

from __future__ import annotations

import copy
import gc
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy
from typing_extensions import override

from lightning_dist.compat.fakes import form_fake_world
from lightning_dist.compat.torch import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
    tree_leaves,
)
from lightning_dist.explain.fakes import Fakes, without_values
from lightning_dist.explain.live_bytes import LiveBytes
from lightning_dist.layout import Layout
from lightning_dist.patches import Patches
from lightning_dist.random_states import kept_random_states
from lightning_dist.report.memory import MemoryPeak, MemoryReport

STEPS = 2
"""Of the optimizer: in the second its states are there from the beginning."""

NEED_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)

_PACKAGE = str(Path(__file__).parents[1])


class PeakMemory(Callback):
    """Tells the peaks of a fit that runs under a count: of the set-up, of the first step, and of the last one.

    Args:
        count: entered before the module is made.
    """

    def __init__(self, count: LiveBytes) -> None:
        self._count = count
        self._when = "set-up"
        self.peaks: dict[str, MemoryPeak] = {}

    def _note(self) -> None:
        if self._when not in self.peaks or self._count.peak > self.peaks[self._when].total:
            self.peaks[self._when] = MemoryPeak(self._count.peak, self._count.parts)
        self._count.forget_peak()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count.label("parameters", pl_module.parameters())
        self._note()
        gc.collect()  # of what the set-up tried and compared, which a run frees at some moment
        self._count.forget_peak()

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._when = "later steps" if trainer.global_step else "first step"
        self._count.part = "activations"

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._count.label("gradients", [p.grad for p in pl_module.parameters()])

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._count.part = "other"
        self._count.label("parameters", pl_module.parameters())
        for optimizer in trainer.optimizers:
            self._count.label("optimizer states", tree_leaves(dict(optimizer.state)))
        self._note()


def dry_run(
    make: Callable[[], pl.LightningModule],
    strategy: Strategy,
    layout: Layout,
    batch: Any,
    trainer: Mapping[str, Any] | None = None,
) -> MemoryReport:
    """What ranks of a fit would hold at their peaks, without the fit, other processes, or memory for it.

    The fit is that of a Trainer, with the steps of its optimizer, callbacks aside; see [Note: what is fake]. What
    kernels allocate for themselves, and an allocator rounds up to, is not counted.

    Args:
        make: makes the module.
        strategy: that would train it; a copy is used.
        layout: resolved.
        batch: of a data rank, for every step; real.
        trainer: arguments of the Trainer that change what a step holds, such as ``precision``.

    Raises:
        ValueError: the layout does not fit the module; or a step can't be run without values, in one sentence.
        RuntimeError: this process is a rank of a run already.
    """
    place = partial(Place, num_ranks=layout.world_size)
    firsts = range(0, layout.world_size, layout.world_size // layout.pp)
    return MemoryReport({r: peaks_of_rank(make, strategy, place(r), batch, trainer or {}) for r in firsts})


def peaks_of_rank(
    make: Callable[[], pl.LightningModule], strategy: Strategy, place: Place, batch: Any, trainer: Mapping[str, Any]
) -> dict[str, MemoryPeak]:
    """Those of one rank by when, see :func:`dry_run`."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    strategy = copy.deepcopy(strategy)
    vars(strategy).update(teardown=_leave, on_exception=_leave)
    fakes, count = Fakes(mode), LiveBytes(mode)
    with _alone(place), without_values(fakes), fakes, count:
        peaks = PeakMemory(count)
        module = make()
        fakes.take(module)
        arguments = {**trainer, "strategy": strategy, "devices": place.world_size(), "plugins": [place]}
        with _told_in_a_sentence():
            fit_steps(module, batch, [peaks], accelerator="cpu", **arguments)
    return peaks.peaks


def fit_steps(module: pl.LightningModule, batch: Any, callbacks: list[Callback], **arguments: Any) -> None:
    """As many steps of the optimizer as :data:`STEPS`, on one batch, with nothing beside them."""
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = pl.Trainer(**quiet, **arguments, max_steps=STEPS, limit_val_batches=0, callbacks=callbacks)
    trainer.fit(module, _Batches(batch, STEPS * trainer.accumulate_grad_batches))


def _leave(*_: Any) -> None:
    """Fakes are not moved, nor made whole, at the end."""


@contextmanager
def _told_in_a_sentence() -> Iterator[None]:
    """Turns an error of a step that asks for values, or for what fakes can't do, into a ValueError that says where."""
    try:
        yield
    except Exception as error:
        causes = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)  # type: ignore[arg-type]
        found = next((e for e in causes if isinstance(e, NEED_VALUES)), None)
        if found is None and isinstance(error, ValueError):
            raise
        if found is None:
            what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise ValueError(f"the peak can't be told, as a step fails on tensors without values: {what}") from error
        frames = traceback.extract_tb(found.__traceback__)
        users = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(_PACKAGE)]
        frame = (users or frames)[-1]
        raise ValueError(
            f"the peak can't be told: {frame.filename}:{frame.lineno} ({frame.line}) asks for values that depend on "
            "parameters, and a dry run computes none"
        ) from error


class Place(LightningEnvironment):
    """Tells the Trainer which rank of how many it is."""

    creates_processes_externally = True

    def __init__(self, rank: int, num_ranks: int) -> None:
        super().__init__()
        self._rank, self._num_ranks = rank, num_ranks

    @override
    def global_rank(self) -> int:
        return self._rank

    local_rank = global_rank

    @override
    def world_size(self) -> int:
        return self._num_ranks

    @override
    def set_global_rank(self, global_rank: int) -> None:
        """It is known."""

    @override
    def set_world_size(self, size: int) -> None:
        """It is known."""


class _Batches:
    """A loader of one batch, several times."""

    def __init__(self, batch: Any, number: int) -> None:
        self._batch, self._number = batch, number

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[Any]:
        return iter([self._batch] * self._number)


@contextmanager
def _alone(place: Place) -> Iterator[None]:
    """Makes this process a rank of a world that is not there, and takes all of it back."""
    if dist.is_initialized():
        raise RuntimeError("a dry run makes a process group of its own, and there is one; run it in a process without")
    of_all: Any = rank_zero_only
    log = logging.getLogger("lightning.pytorch")
    with Patches() as patches, warnings.catch_warnings(), kept_random_states(torch.device("cpu")):
        warnings.simplefilter("ignore")
        patches.also(partial(setattr, of_all, "rank", of_all.rank))
        patches.also(partial(log.setLevel, log.level))
        log.setLevel(logging.ERROR)
        patches.set(dist, "broadcast_object_list", lambda *_, **__: None)
        form_fake_world(place.global_rank(), place.world_size())
        try:
            yield
        finally:
            dist.destroy_process_group()
