"""What a module or a callback collects by hand in an evaluation: each sample once."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.data.strategies import layouts, strategy_of
from tests.support import models
from tests.support.parity import QUIET, once
from tests.support.ranks import run_on_ranks


class Meter:
    """As people write it: sum and count."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def update(self, value: float, rows: int) -> None:
        self.sum += value * rows
        self.count += rows


class Collects(models.Classifier):
    """Collects in every way that evaluation code is written in."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Any] = []
        self.by_class: dict[int, list[Tensor]] = {}
        self.meter, self.rows = Meter(), 0
        self.register_buffer("confusion", torch.zeros(models.CLASSES, models.CLASSES))
        self.total = torch.zeros(())
        self.found: dict[str, Any] = {}

    def on_validation_epoch_start(self) -> None:
        self.outputs, self.by_class = [], {}
        self.meter, self.rows = Meter(), 0
        self.confusion.zero_()
        self.total.zero_()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self.net(x)
        self.outputs.append({"logits": logits, "y": y})
        for klass, row in zip(y.tolist(), logits, strict=True):
            self.by_class.setdefault(klass, []).append(row)
        self.meter.update(float(nn.functional.cross_entropy(logits, y)), len(y))
        self.rows += len(y)
        self.confusion.index_put_((y, logits.argmax(1)), torch.ones(len(y)), accumulate=True)
        self.total += logits.sum()

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        logits = torch.cat([output["logits"] for output in self.outputs])
        y = torch.cat([output["y"] for output in self.outputs])
        own = {
            "rows": torch.tensor(float(self.rows)),
            "meter": torch.tensor(self.meter.sum),
            "confusion": self.confusion,
            "total": self.total,
            "by_class": torch.tensor([float(len(self.by_class.get(k, []))) for k in range(models.CLASSES)]),
        }
        gathered = self.all_gather({"logits": logits, "y": y})
        self.found = {name: self.trainer.strategy.reduce(value, reduce_op="sum") for name, value in own.items()}
        self.found["accuracy"] = (
            (gathered["logits"].reshape(-1, models.CLASSES).argmax(1) == gathered["y"].reshape(-1)).float().mean()
        )
        listed = self.all_gather(self.outputs)
        self.found["listed"] = torch.tensor(float(sum(output["y"].numel() for output in listed)))

    on_test_epoch_end = on_validation_epoch_end


class GathersInTheStep(models.Classifier):
    """Every rank collects what all ranks have of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        hits = (self.net(x).argmax(1) == y).float()
        self.kept.append(self.all_gather(hits).reshape(-1))


class Remembers(Callback):
    def __init__(self) -> None:
        self.rows = 0
        self.batches: list[int] = []

    def on_test_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int, *_: Any) -> None:
        self.rows += len(batch[1])
        self.batches.append(index)

    on_validation_batch_end = on_test_batch_end


def evaluate(layout: str | None, count: int) -> dict[str, Any]:
    L.seed_everything(1, verbose=False)
    module, remembers = Collects(), Remembers()
    world = torch.distributed.get_world_size() if layout else 1
    trainer = L.Trainer(**QUIET, devices=world, strategy=strategy_of(layout), callbacks=[remembers])
    loader = DataLoader(models.samples(count), batch_size=4)
    results = []
    for run in (trainer.test, trainer.validate):
        run(module, loader, verbose=False)
        results.append({name: value.clone() for name, value in module.found.items()})
    rows = trainer.strategy.reduce(torch.tensor(float(remembers.rows)), reduce_op="sum")
    return {"found": results, "callback": float(rows), "batches": len(remembers.batches)}


@pytest.mark.parametrize(("layout", "num_ranks"), layouts("dp_replicate=2", "dp_shard=2", "tp=2"))
@pytest.mark.parametrize("count", [3, 20, 22])
def test_what_is_collected_by_hand_is_each_sample_once(layout: str, num_ranks: int, count: int) -> None:
    one = once(evaluate, None, count)
    for rank in run_on_ranks(num_ranks, evaluate, layout, count):
        assert rank["callback"] == one["callback"]
        for found, expected in zip(rank["found"], one["found"], strict=True):
            for name, value in expected.items():
                torch.testing.assert_close(found[name].float(), value.float(), rtol=1e-4, atol=1e-4, msg=name)


def gather_in_step(layout: str | None, count: int) -> Tensor:
    L.seed_everything(1, verbose=False)
    module = GathersInTheStep()
    world = torch.distributed.get_world_size() if layout else 1
    trainer = L.Trainer(**QUIET, devices=world, strategy=strategy_of(layout))
    trainer.test(module, DataLoader(models.samples(count), batch_size=4), verbose=False)
    return torch.cat(module.kept)


@pytest.mark.parametrize("layout", ["dp_replicate=2", "dp_shard=2"])
def test_gathering_in_a_step_gives_each_row_once(layout: str) -> None:
    one = once(gather_in_step, None, 22)
    assert len(one) == 22
    first, second = run_on_ranks(2, gather_in_step, layout, 22)
    # rank 0 runs as many own batches as anyone, so it has all rounds
    assert torch.equal(first, one)
    assert len(second) == 22 or torch.equal(second, one)


class Predicts(models.Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.kept.append(batch[1])
        return batch[1]


def predict(layout: str) -> int:
    module = Predicts()
    trainer = L.Trainer(**QUIET, devices=2, strategy=strategy_of(layout))
    trainer.predict(module, DataLoader(models.samples(20), batch_size=4))
    return sum(len(rows) for rows in module.kept)


def test_what_a_prediction_collects_is_each_sample_once() -> None:
    assert sum(run_on_ranks(2, predict, "dp_shard=2")) == 20
