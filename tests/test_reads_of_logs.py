"""A user's own code that reads logged values while steps run: one process's values, on every rank."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partialmethod
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_only
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_dist import Layout
from lightning_dist.logs import StepLogs, results
from tests.support import models
from tests.support.models import samples
from tests.support.parity import once, trainer
from tests.support.ranks import RankError, run_on_ranks

pytestmark = pytest.mark.sampled

FOUR = pytest.param("pp=2,dp_replicate=2", marks=pytest.mark.slow)
LAYOUTS = ["dp_replicate=2", "dp_shard=2", "tp=2", "pp=2", FOUR]
SPLIT = ["dp_replicate=2", "pp=2"]

NOTES: list[tuple[str, int, dict[str, float]]] = []
"""What was read: by whom, in which step, which values."""


def note(reader: str, runner: L.Trainer, names: str = "callback_metrics") -> None:
    values = {name: float(value) for name, value in getattr(runner, names).items()}
    NOTES.append((reader, runner.fit_loop.total_batch_idx, values))


class Bare(models.Momentum):
    """Logs nothing by itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])


class Logging(Bare):
    """A step's loss, a sum and an extreme, as a user of one process logs them."""

    sync = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, prog_bar=True, sync_dist=self.sync)
        self.log("rows", float(len(batch[0])), reduce_fx="sum", sync_dist=self.sync)
        self.log("both", loss * 2, on_step=True, on_epoch=True, sync_dist=self.sync)
        return loss


class Plain(Bare):
    """Says nothing of ranks."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, prog_bar=True)
        return loss


class Synced(Logging):
    sync = True


class Everywhere(Callback):
    """Reads all three properties in every hook of a step."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        note("start", trainer)

    def on_before_backward(self, trainer: L.Trainer, *args: Any) -> None:
        note("backward", trainer)

    def on_after_backward(self, trainer: L.Trainer, *args: Any) -> None:
        note("gradients", trainer, "logged_metrics")

    def on_before_zero_grad(self, trainer: L.Trainer, *args: Any) -> None:
        note("zero", trainer, "logged_metrics")

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        note("end", trainer)
        note("bar", trainer, "progress_bar_metrics")


class InSteps(Logging):
    """The module's own hooks, which log too, and its optimizer step."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        note("optimizer", self.trainer)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("rate", self.trainer.callback_metrics["loss"] * 2)

    def on_train_batch_end(self, *args: Any) -> None:
        note("module", self.trainer)


class Periodic(Callback):
    """On rank 0 alone, and only sometimes."""

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *args: Any) -> None:
        if trainer.is_global_zero and args[-1] % 3 == 2:
            self.show(trainer)

    @rank_zero_only
    def show(self, trainer: L.Trainer) -> None:
        note("rank 0", trainer)


class Chained(Callback):
    """Logs, for the next one to read on rank 0."""

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *args: Any) -> None:
        module.log("chained", outputs["loss"], on_step=True, on_epoch=False)


class Hidden(Callback):
    """Reads in a way that its code does not tell."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        values = {name: float(value) for name, value in getattr(trainer, "_".join(("callback", "metrics"))).items()}
        NOTES.append(("hidden", trainer.fit_loop.total_batch_idx, values))


def read(layout: str, module: Callable[[], L.LightningModule], callbacks: list[Callback], arguments: Any) -> Any:
    """What was read on this rank, and what the trainer has after the fit."""
    L.seed_everything(1, verbose=False)
    NOTES.clear()
    arguments = {"log_every_n_steps": 50, "limit_train_batches": 6, "val_check_interval": 3, **arguments}
    if "tp" in layout:
        arguments["strategy"] = {"tensor_plan": {"net.blocks.*.up": "colwise", "net.blocks.*.down": "rowwise"}}
    runner = trainer(layout, callbacks=callbacks, **arguments)
    ranks = Layout.parse(layout).resolve(runner.world_size).num_data_ranks
    runner.fit(module(), DataLoader(samples(), batch_size=8 // ranks), DataLoader(samples(8), batch_size=4 // ranks))
    note("after", runner)
    return list(NOTES)


def assert_reads(
    layout: str, module: Any, callbacks: list[Callback], only_rank_0: bool = False, **arguments: Any
) -> None:
    one = once(read, "dp_replicate=1", module, callbacks, arguments)
    assert len(one) > 2
    num_ranks = 4 if "," in layout else 2
    for rank, notes in enumerate(run_on_ranks(num_ranks, read, layout, module, callbacks, arguments)):
        expected = one[-1:] if only_rank_0 and rank else one
        assert [entry[:2] for entry in notes] == [entry[:2] for entry in expected]
        for (reader, step, values), (_, _, wanted) in zip(notes, expected, strict=True):
            assert values == pytest.approx(wanted, rel=1e-5), f"rank {rank}: {reader}, step {step}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("module", [Logging, Synced])
def test_callbacks_read_one_process_values_in_every_hook(layout: str, module: Any) -> None:
    assert_reads(layout, module, [Everywhere()])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_modules_read_one_process_values_in_their_hooks(layout: str) -> None:
    assert_reads(layout, InSteps, [])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rank_0_may_read_alone_what_other_callbacks_log(layout: str) -> None:
    assert_reads(layout, Logging, [Chained(), Periodic()], only_rank_0=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_that_no_code_tells_of_are_whole(layout: str) -> None:
    assert_reads(layout, Logging, [Hidden()])


@pytest.mark.parametrize("layout", SPLIT)
def test_reads_under_accumulation_equal_one_process(layout: str) -> None:
    assert_reads(layout, Logging, [Everywhere(), Hidden()], accumulate_grad_batches=4)


class Validated(Logging):
    """Logs values of validation steps, and of a hook."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", F.cross_entropy(self(batch[0]), batch[1]), on_step=True, on_epoch=True)


class InValidation(Callback):
    """Reads values of training steps and of validation steps in hooks of a validation that runs within an epoch."""

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        note("batch", trainer, "logged_metrics")

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        note("validated", trainer)


@pytest.mark.parametrize("layout", [*SPLIT, FOUR])
def test_hooks_of_a_validation_read_one_process_values(layout: str) -> None:
    # one batch of one process is one of each data rank
    assert_reads(layout, Validated, [InValidation()], num_sanity_val_steps=0)


class Skips(Callback):
    """Ends the epoch early, after a step that the loggers do not write."""

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> Any:
        module.done = batch_idx == 2

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        note("epoch", trainer)


class Skipped(Logging):
    def on_train_batch_start(self, *args: Any) -> Any:
        return -1 if self.done else None


class Stops(Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = args[-1] == 1
        NOTES.append(("stops", args[-1], {}))


@pytest.mark.parametrize(("module", "callback"), [(Skipped, Skips()), (Logging, Stops())])
def test_values_of_a_last_step_that_came_early_are_whole(module: Any, callback: Callback) -> None:
    assert_reads("dp_replicate=2", module, [callback, Hidden()], log_every_n_steps=0, limit_val_batches=0)


# ---------------------------------------------------------------- what it costs


class Idle(Callback):
    """Overrides hooks of steps and reads in others."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        NOTES.append(("idle", trainer.global_step, {}))

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        note("epoch", trainer)


def _reductions(layout: str, module: Any, callbacks: list[Callback]) -> list[int]:
    """Collectives for logged values, by training step."""
    counts: list[int] = []

    reduce = results.all_reduce_logged
    starts = {name: getattr(StepLogs, name) for name in ("_on_batch_start", "_epoch_end_reached")}

    def counted(*args: Any) -> Any:
        counts[-1] += 1
        return reduce(*args)

    def started(logs: StepLogs, name: str, *args: Any) -> None:
        counts.append(0)
        starts[name](logs, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "all_reduce_logged", counted)
        for name in starts:
            patch.setattr(StepLogs, name, partialmethod(started, name))
        read(layout, module, callbacks, {"limit_val_batches": 0})
    return counts[:6]


@pytest.mark.parametrize(
    ("layout", "module", "callbacks", "counts"),
    [
        pytest.param("dp_replicate=2", Plain, [Idle()], [0, 0, 0, 0, 0, 1], id="nobody reads"),
        pytest.param("dp_replicate=2", Logging, [Idle()], [1, 0, 0, 0, 0, 1], id="sync_dist that is off"),
        pytest.param("dp_replicate=2", Synced, [Idle()], [1, 1, 1, 1, 1, 2], id="sync_dist"),
        pytest.param("dp_replicate=2", Plain, [Everywhere()], [1, 1, 1, 1, 1, 2], id="many readers"),
        pytest.param("dp_replicate=2", Plain, [Periodic()], [1, 1, 1, 1, 1, 2], id="a reader on rank 0"),
        pytest.param("pp=2", Plain, [Idle()], [1, 1, 1, 1, 1, 1], id="pp, nobody reads"),
        pytest.param("pp=2", Plain, [Everywhere()], [1, 1, 1, 1, 1, 2], id="pp, many readers"),
    ],
)
def test_values_are_reduced_once_a_step_where_they_are_read(
    layout: str, module: Any, callbacks: list[Callback], counts: list[int]
) -> None:
    assert run_on_ranks(2, _reductions, layout, module, callbacks) == [counts, counts]


# ---------------------------------------------------------------- one rank alone


class Bar(TQDMProgressBar):
    """As Lightning's documentation changes what is shown."""

    def get_metrics(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        shown = super().get_metrics(*args, **kwargs)
        shown.pop("v_num", None)
        NOTES.append(("shown", 0, {name: float(value) for name, value in shown.items()}))
        return shown


def _shown(layout: str, module: Any) -> list[dict[str, float]]:
    notes = read(layout, module, [Bar()], {"enable_progress_bar": True, "limit_val_batches": 0})
    return [values for reader, _, values in notes if reader == "shown"]


def test_a_progress_bar_shows_values_with_sync_dist_whole_and_no_rank_waits_for_it() -> None:
    one = once(_shown, "dp_replicate=1", Synced)
    shown, nothing = run_on_ranks(2, _shown, "dp_replicate=2", Synced)
    assert shown == [pytest.approx(values, rel=1e-5) for values in one]
    assert not nothing
    assert len(run_on_ranks(2, _shown, "dp_replicate=2", Logging)[0]) == len(one)


class HiddenOnRank0(Hidden):
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.is_global_zero:
            super().on_train_batch_end(trainer, *args)


class Decorated(Hidden):
    on_train_batch_end = rank_zero_only(Hidden.on_train_batch_end)


def _refused(callback: Callback) -> str:
    from datetime import timedelta

    from lightning_dist.logs import readers

    patience, readers.PATIENCE = readers.PATIENCE, timedelta(seconds=1)
    try:
        read("dp_replicate=2", Logging, [callback], {"limit_val_batches": 0})
    except Exception as error:
        return str(error)
    finally:
        readers.PATIENCE = patience
    return "nothing"


@pytest.mark.parametrize("callback", [HiddenOnRank0(), Decorated()])
def test_a_read_on_rank_0_alone_that_no_code_tells_of_is_refused(callback: Callback) -> None:
    with pytest.raises(RankError, match=r"ranks \[1\] gave no answer") as raised:  # it waits for the one that ended
        run_on_ranks(2, _refused, callback, patience=5)
    first = raised.value.answers[0]
    assert "reads logged values (trainer.callback_metrics or the like) of a step on this rank, and not on all" in first


class OfRank0(Logging):
    """As Lightning has it for values of one rank."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.is_global_zero:
            self.log("only", 3.0, rank_zero_only=True)
        return super().training_step(batch, batch_idx)


def test_what_is_logged_for_rank_zero_only_stays_there_and_nobody_waits() -> None:
    first, second = run_on_ranks(2, read, "dp_replicate=2", OfRank0, [Everywhere()], {"limit_val_batches": 0})
    ends = [[values for reader, _, values in notes if reader == "end"] for notes in (first, second)]
    assert [values.pop("only") for values in ends[0]] == [3.0] * 6
    assert ends[0] == ends[1]


# ---------------------------------------------------------------- numbers of parameters


class OfParameters(Logging):
    """Logs a parameter of one number and norms of others, in a step and in hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: Any) -> Any:
        return super().forward(x) * self.scale

    def on_train_batch_end(self, *args: Any) -> None:
        self.log("scale", self.scale, on_step=True, on_epoch=True)
        self.log("up", self.net.blocks[0].up.weight.norm(), on_step=True, on_epoch=False)
        self.log("down", self.net.blocks[2].down.weight.square().sum(), on_step=True, on_epoch=False)


@pytest.mark.parametrize("layout", [*LAYOUTS, pytest.param("dp_shard=2,tp=2", marks=pytest.mark.slow)])
def test_numbers_of_parameters_are_logged_whole(layout: str) -> None:
    assert_reads(layout, OfParameters, [Everywhere()])


class InStep(Logging):
    """Reads in the step what it has just logged."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        note("step", self.trainer)
        return loss


def test_a_step_reads_what_it_has_just_logged() -> None:
    assert_reads("dp_replicate=2", InStep, [])


def _in_microbatches() -> str:
    try:
        read("pp=2", InStep, [], {})
    except Exception as error:
        return "".join(traceback.format_exception(error))  # torch's schedule says first where it was
    return "nothing"


def test_a_step_under_pp_that_reads_what_its_microbatches_log_is_refused() -> None:
    errors = run_on_ranks(2, _in_microbatches)
    assert "nothing" not in errors
    assert "pp: the step reads logged values" in errors[1]


class Frozen(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


class Unequal(IterableDataset):
    """Batches of 5 and of 3 samples for two ranks; of all 8 for one process."""

    def __iter__(self) -> Any:
        x, y = samples().tensors  # type: ignore[attr-defined]
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else -1
        part = {-1: slice(0, 8), 0: slice(0, 5), 1: slice(5, 8)}[rank]
        return iter([(x[start:][part], y[start:][part]) for start in range(0, 32, 8)])


def _unequal() -> list[dict[str, float]]:
    L.seed_everything(1, verbose=False)
    NOTES.clear()
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    trainer(f"dp_replicate={world}", callbacks=[Everywhere()]).fit(Frozen(), DataLoader(Unequal(), batch_size=None))
    return [values for reader, _, values in NOTES if reader == "end"]


def test_means_of_batches_of_unequal_size_are_weighted() -> None:
    one = _unequal()
    assert len(one) == 4
    for values in run_on_ranks(2, _unequal):
        assert values == [pytest.approx(wanted, rel=1e-5) for wanted in one]
