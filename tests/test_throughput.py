"""Rates of a training under a layout: ranks that see the same samples count them once."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ThroughputMonitor, throughput_monitor
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader, Dataset

from lightning_dist import HybridStrategy, Throughput
from lightning_dist.report import throughput
from tests.support.models import BLOCK_PLAN, Classifier, samples
from tests.support.parity import QUIET
from tests.support.ranks import run_on_ranks

BATCH, READING, COMPUTING, FLOPS, PEAK = 4, 0.25, 3.0, 1e6, 1e7
LAYOUTS = [("dp_shard=2", 2, 2), ("tp=2", 2, 1), ("pp=2", 2, 1), ("dp_replicate=2,tp=2", 4, 2)]


class Seconds:
    """A clock that only goes on where it is told to."""

    now = 0.0


CLOCK = SimpleNamespace(perf_counter=lambda: Seconds.now)
STEP = BATCH * READING + COMPUTING


class Read(Dataset):
    """Samples that take a while to be read."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        Seconds.now += READING
        return samples()[index]


class Timed(Classifier):
    """A step that takes a while; and what Lightning's monitor asks for."""

    flops_per_batch = FLOPS

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        Seconds.now += COMPUTING


class Kept(DummyLogger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.rows.append(dict(metrics))


def _logged(layout: str, callback: Any) -> list[dict[str, float]]:
    logger = Kept()
    plan = {"tensor_plan": BLOCK_PLAN} if "tp" in layout else {}
    trainer = L.Trainer(
        **{**QUIET, "logger": logger},
        devices=torch.distributed.get_world_size() if layout else 1,
        strategy=HybridStrategy(layout, **plan) if layout else "auto",
        max_steps=6,
        log_every_n_steps=2,
        callbacks=[callback],
    )
    trainer.fit(Timed(), DataLoader(Read(), batch_size=BATCH))
    return logger.rows


def _paced(layout: str) -> dict[str, float]:
    throughput.time = CLOCK  # type: ignore[assignment]
    rows = _logged(layout, Throughput(flops_per_sample=FLOPS, peak_flops=PEAK))
    return next(row for row in reversed(rows) if "step_time" in row)


@pytest.mark.parametrize(("layout", "num_ranks", "num_data_ranks"), LAYOUTS)
def test_samples_are_those_of_the_data_ranks_and_operations_of_all_devices(
    layout: str, num_ranks: int, num_data_ranks: int
) -> None:
    for row in run_on_ranks(num_ranks, _paced, layout)[:1]:
        assert row["step_time"] == pytest.approx(STEP)
        assert row["data_wait"] == pytest.approx(BATCH * READING / STEP)
        assert row["samples_per_second"] == pytest.approx(BATCH * num_data_ranks / STEP)
        assert row["mfu"] == pytest.approx(BATCH * num_data_ranks * FLOPS / STEP / (num_ranks * PEAK))


def test_a_peak_that_is_not_known_is_asked_for() -> None:
    trainer = L.Trainer(**{**QUIET, "accelerator": "cpu"}, callbacks=[Throughput(flops_per_sample=2e9)])
    with pytest.raises(ValueError, match=re.escape("Throughput(flops_per_sample=2e+09): the peak of cpu is not known")):
        trainer.fit(Classifier(), DataLoader(samples(), batch_size=4))


class OfKnownPeak(ThroughputMonitor):
    """As on a device that Lightning knows."""

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_start(trainer, *args)
        for rates in self._throughputs.values():
            rates.available_flops = PEAK


def _monitored(layout: str) -> list[dict[str, float]]:
    throughput_monitor.time = CLOCK  # type: ignore[assignment]
    return _logged(layout, OfKnownPeak(batch_size_fn=lambda batch: len(batch[0]), window_size=2))


@pytest.mark.parametrize(("layout", "num_ranks", "num_data_ranks"), LAYOUTS)
def test_lightnings_monitor_counts_samples_once(layout: str, num_ranks: int, num_data_ranks: int) -> None:
    name = "train/{}".format
    rows = run_on_ranks(num_ranks, _monitored, layout)[0]
    row = next(row for row in reversed(rows) if name("time") in row)
    assert row[name("batches_per_sec")] == pytest.approx(num_data_ranks / STEP)
    assert row[name("samples_per_sec")] == pytest.approx(BATCH * num_data_ranks / STEP)
    assert row[name("flops_per_sec")] == pytest.approx(FLOPS * num_data_ranks / STEP)
    for rate in ("samples_per_sec", "batches_per_sec", "flops_per_sec"):
        assert row[name(f"device/{rate}")] == pytest.approx(row[name(rate)] / num_ranks)
    assert row[name("device/mfu")] == pytest.approx(row[name("flops_per_sec")] / (num_ranks * PEAK))
