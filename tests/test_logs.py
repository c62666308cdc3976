"""What modules log, over ranks: one value, the same decisions, no rank left waiting."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dist.compat.lightning import has_batches
from lightning_dist.logs import StepLogs, results
from lightning_dist.logs.reductions import REDUCTIONS
from tests.support import models
from tests.support.collectives import Collectives
from tests.support.models import few_samples, samples
from tests.support.parity import Run, assert_equal, assert_parity, on_layout, one_process, trainer
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

LAYOUTS = [pytest.param("dp_replicate=2", 2), pytest.param("dp_shard=2", 2)]


class ByClass(models.Momentum):
    """Logs a name only if the batch has such samples, in an order that the batch decides."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        losses = torch.nn.functional.cross_entropy(self(x), y, reduction="none")
        kinds = (x[:, 0] > 0).long()
        for kind in kinds.unique(sorted=False).tolist()[:: 1 if kinds[0] else -1]:
            mine = losses[kinds == kind]
            self.log(f"loss/{kind}", mine.mean(), batch_size=len(mine), on_step=False, on_epoch=True)
            self.log(f"count/{kind}", float(len(mine)), reduce_fx="sum", on_step=False, on_epoch=True)
            self.log(f"least/{kind}", mine.min(), reduce_fx=min, on_step=True, on_epoch=True)
        return losses.mean()


class OnRank0(models.Momentum):
    """Logs values on one rank only, in steps and in hooks."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_rank == 0:
            self.log("only/step", 3.0)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_rank == 0:
            self.log("only/hook", 5.0, on_step=True, on_epoch=True)

    def on_train_epoch_end(self) -> None:
        if self.global_rank == 0:
            self.log("only/end", 7.0)


class InHooks(models.Classifier):
    """Logs in the hooks of ends; a scheduler and a checkpoint decide by it."""

    def on_train_epoch_start(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].detach())
        self.log("hook/loss", outputs["loss"], on_step=True, on_epoch=True)

    def on_train_epoch_end(self) -> None:
        self.log("epoch/loss", torch.stack(self.losses).mean())

    def on_validation_batch_end(self, outputs: Any, batch: Any, *args: Any) -> None:
        self.log("hook/count", float(len(batch[1])), reduce_fx="sum", on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "epoch/loss"}}


class Copied(models.Classifier):
    """Keeps a copy of itself, whose logs are nobody's."""

    def on_train_start(self) -> None:
        self.__dict__["twin"] = copy.deepcopy(self)
        pickle.dumps(self.__dict__["twin"])

    def on_train_epoch_end(self) -> None:
        twin = self.__dict__["twin"]
        assert "log" not in vars(twin)
        twin.log("twin", 1.0)


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS)
def test_names_that_only_some_ranks_log_keep_their_own_values(layout: str, num_ranks: int) -> None:
    run = Run(ByClass, models.sorted_samples, trainer={"max_epochs": 2})
    one = one_process(run)
    assert one.logged["count/0"] == 32
    records = on_layout(run, layout, num_ranks)
    for record in records:
        assert record.logged.keys() == one.logged.keys()
        for name, value in one.logged.items():
            if not name.startswith("least") or name.endswith("_epoch"):
                assert record.logged[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS)
def test_what_rank_0_alone_logs_reaches_every_rank(layout: str, num_ranks: int) -> None:
    assert_parity(Run(OnRank0, samples, trainer={"max_epochs": 2}), layout, num_ranks)


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS)
def test_logs_of_hooks_equal_one_process_and_schedules_follow_them(layout: str, num_ranks: int) -> None:
    run = Run(InHooks, samples, few_samples, trainer={"max_epochs": 4})
    one = one_process(run)
    assert one.logged["hook/count"] == 13
    for record in on_layout(run, layout, num_ranks):
        assert_equal(one, record)


def test_checkpoints_monitor_the_value_of_all_ranks_after_the_training_epoch(tmp_path: Any) -> None:
    scores = run_on_ranks(2, _best_score, tmp_path)
    assert scores[0] == scores[1]


def _best_score(folder: Any) -> tuple[float, float]:
    L.seed_everything(1, verbose=False)
    best = ModelCheckpoint(folder, monitor="epoch/loss", save_on_train_epoch_end=True)
    step = ModelCheckpoint(folder / "step", monitor="hook/loss_step", every_n_train_steps=2, save_top_k=1)
    runner = trainer("dp_replicate=2", callbacks=[best, step], enable_checkpointing=True, log_every_n_steps=100)
    runner.fit(InHooks(), DataLoader(samples(), batch_size=4))
    assert best.best_model_score is not None
    assert step.best_model_score is not None
    return float(best.best_model_score), float(step.best_model_score)


def test_values_are_reduced_in_one_collective_at_written_steps_and_in_none_between(tmp_path: Any) -> None:
    for counts in run_on_ranks(2, _collectives_by_step, tmp_path):
        assert counts == [0, 0, 0, 1, 0, 0, 0, 1]


class ManyValues(models.Momentum):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log_dict({f"value/{i}": loss * i for i in range(20)})
        self.log("prog", loss, True)
        return loss


def _collectives_by_step(folder: Any) -> list[int]:
    counts: list[int] = []
    mode = Collectives()
    reduce, end = results.all_reduce_logged, StepLogs._on_batch_end

    def counted(*args: Any) -> Any:
        if not has_batches(runner):
            return reduce(*args)
        with mode:
            return reduce(*args)

    def ended(logs: StepLogs, *args: Any) -> None:
        end(logs, *args)
        counts.append(sum(mode.count.values()))
        mode.count.clear()

    runner = trainer("dp_replicate=2", log_every_n_steps=4, logger=CSVLogger(folder, name="csv", version=0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "all_reduce_logged", counted)
        patch.setattr(StepLogs, "_on_batch_end", ended)
        runner.fit(ManyValues(), DataLoader(samples(), batch_size=4))
    return counts


def test_a_module_with_metrics_can_be_copied_and_pickled_in_a_run() -> None:
    assert_parity(Run(Copied, samples, few_samples), "dp_replicate=2", 2)


def test_after_a_run_lightning_has_its_own_methods_back() -> None:
    assert run_on_ranks(2, _left_behind) == [[], []]


def _left_behind() -> list[str]:
    class Failing(models.Classifier):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("on purpose")

    runner = trainer("dp_replicate=2")
    with pytest.raises(RuntimeError, match="on purpose"):
        runner.fit(Failing(), DataLoader(samples(), batch_size=4))
    fit = runner.fit_loop
    owners = [runner, runner._logger_connector, runner._data_connector, runner.profiler, *runner.callbacks]
    owners += [fit, fit.epoch_loop, fit.epoch_loop.val_loop, fit.epoch_loop._results]
    owners += [fit.epoch_loop.automatic_optimization]
    owners += [runner.lightning_module, *runner.lightning_module.modules()]
    return [
        f"{type(owner).__name__}.{name}" for owner in owners for name, value in vars(owner).items() if _is_ours(value)
    ]


def _is_ours(value: Any) -> bool:
    while isinstance(value, partial):
        value = value.func
    return callable(value) and str(getattr(value, "__module__", "")).startswith("lightning_dist")


@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_neutral_value_changes_no_reduction(name: str) -> None:
    reduction = REDUCTIONS[name]
    values = [torch.tensor(-3.0), torch.tensor(2.0)]
    alone = reduction.combine(values, [1.0, 2.0])
    assert torch.equal(alone, reduction.combine([*values, torch.tensor(reduction.neutral)], [1.0, 2.0, 0.0]))
