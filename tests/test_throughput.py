"""Rates of a training under a layout: ranks that see the same samples count them once."""

from __future__ import annotations

import re
import threading
import time
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ThroughputMonitor, throughput_monitor
from lightning.pytorch.loggers.logger import DummyLogger
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_dist import HybridStrategy, Throughput
from lightning_dist.elastic import pulse, stacks
from lightning_dist.report import throughput
from lightning_dist.report.communication import covered, exposed
from tests.support.models import BLOCK_PLAN, Classifier, samples
from tests.support.parity import QUIET, slow
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


# ---------------------------------------------------------------- waiting for communication


class Late(Classifier):
    """One rank comes late to each step."""

    seconds = 0.3

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_rank == self.rank:
            time.sleep(self.seconds)
        return super().training_step(batch, batch_idx)


def _waits(layout: str, late: int) -> float:
    """The share that this rank has among what was logged last."""
    throughput.time = time
    trainer = L.Trainer(
        **QUIET,
        devices=2,
        strategy=HybridStrategy(layout, tensor_plan=BLOCK_PLAN if "tp" in layout else None),
        max_steps=7,
        log_every_n_steps=3,
        callbacks=[Throughput()],
    )
    trainer.fit(Late(late), DataLoader(samples(), batch_size=4))
    return float(trainer.callback_metrics["communication_wait"])


@pytest.mark.parametrize("layout", ["tp=2", slow("pp=2")])
def test_ranks_wait_for_one_that_comes_late(layout: str) -> None:
    waits, late = run_on_ranks(2, _waits, layout, 1)
    if layout == "pp=2":  # a mean over the stages, as all that is logged
        assert 0.25 < waits == late < 0.8
    else:
        assert late < 0.5 < waits <= 1


@pytest.mark.parametrize("layout", ["dp_replicate=2", slow("dp_shard=2")])
def test_what_is_logged_is_the_mean_over_the_data_ranks(layout: str) -> None:
    """DDP waits where Python does not see it."""
    one, other = run_on_ranks(2, _waits, layout, 0)
    assert one == other
    assert 0.25 < one < 0.75


def test_one_process_waits_for_nobody() -> None:
    rows = _logged("", Throughput())
    assert any("data_wait" in row for row in rows)
    assert not any("communication_wait" in row for row in rows)


def test_looks_tell_how_long_a_thread_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time between two looks goes to each."""
    looks = [(1.0, stacks.OWN), (2.0, stacks.WAITS), (4.0, stacks.WAITS), (5.0, stacks.DATA), (9.0, stacks.OWN)]
    moments = iter([pulse._Moment(seconds, does, False, 0.0, 0.0) for seconds, does in looks])
    monkeypatch.setattr(pulse.time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(pulse._Moment, "of", lambda *_: next(moments))
    of_main = pulse.Pulse(lambda: None, threading.main_thread())
    waited = []
    for _ in looks:
        of_main.look()
        waited.append(of_main.waited)
    assert waited == [0.0, 0.5, 2.5, 3.0, 3.0]


class Planted:
    """In the place of a GPU's profile: a step takes longer by what profiling does, and waits for a quarter."""

    share = 0.25

    def __init__(self) -> None:
        self.runs = False
        self.spans: list[tuple[float, float]] = []

    def start(self) -> None:
        Seconds.now += 100
        self.runs, self.begin = True, Seconds.now

    def stop(self) -> float | None:
        if not self.runs:
            return None
        self.runs = False
        self.spans.append((self.begin, Seconds.now))
        Seconds.now += 100
        return self.share


class OnGpu(Throughput):
    """As on a device whose steps are profiled."""

    def setup(self, *args: Any, **kwargs: Any) -> None:
        super().setup(*args, **kwargs)
        self._profile: Any = Planted()


@pytest.mark.parametrize(
    ("every", "accumulate", "num_profiled"), [(1, 1, 15), (3, 1, 5), (1, 2, 7), (3, 2, 2), (50, 1, 0)]
)
def test_a_profiled_step_is_left_out_of_the_rates(
    every: int, accumulate: int, num_profiled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "time", CLOCK)
    callback, logger = OnGpu(communication_every_n_steps=every), Kept()
    L.Trainer(
        **{**QUIET, "logger": logger},
        devices=1,
        max_epochs=1,
        log_every_n_steps=4,
        accumulate_grad_batches=accumulate,
        callbacks=[callback],
    ).fit(Timed(), DataLoader(Read(), batch_size=BATCH))
    spans = callback._profile.spans
    assert [end - begin for begin, end in spans] == pytest.approx([STEP * accumulate] * num_profiled)
    shares = [row["communication_wait"] for row in logger.rows if "communication_wait" in row]
    assert set(shares) == ({Planted.share} if num_profiled else set())
    rates = [row for row in logger.rows if "step_time" in row]
    assert (rates == []) == (every == 1 and accumulate == 1)
    for row in rates:
        assert row["step_time"] == pytest.approx(STEP * accumulate)
        assert row["data_wait"] == pytest.approx(BATCH * READING / STEP)


def _event(name: str, start: float, end: float, **given: Any) -> FunctionEvent:
    return FunctionEvent(0, name, 0, start, end, **{"device_type": DeviceType.CUDA, **given})


def test_a_collective_beside_which_nothing_is_computed_is_exposed() -> None:
    nccl = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    events = [
        _event("void gemm", 0, 10),
        _event(nccl, 5, 20),  # 10 us of it alone
        _event(nccl, 15, 22),  # on another stream: 2 more
        _event("void at::native::elementwise", 22, 24),
        _event("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 30, 40),
        _event("void gemm", 32, 34),
        _event("void gemm", 33, 36),  # 4 us are hidden
        _event("Memcpy HtoD (Pinned -> Device)", 36, 40),
    ]
    assert exposed(events) == 12 + 6
    others = [
        _event("nccl:all_reduce", 100, 200, is_user_annotation=True),
        _event(nccl, 100, 200, device_index=1),
        _event("cudaLaunchKernel", 5, 40, device_type=DeviceType.CPU),
        _event("void gemm", 0, 40, device_index=1),
    ]
    assert exposed([*events, *others], device_index=0) == 18
    assert exposed([]) == 0


def test_what_is_covered_is_counted_once() -> None:
    assert covered([(4, 6), (0, 2), (1, 3), (0, 1), (5, 5)]) == 5


class Saves(L.Callback):
    """Takes a while after each step, as a save does, and fails in one if asked."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        Seconds.now += 2.0
        if batch_idx == self.fails_at:
            raise RuntimeError("the disk is full")


class Stream(IterableDataset):
    """Without a length: Lightning asks for one batch ahead."""

    def __iter__(self) -> Any:
        return (Read()[index] for index in range(64))


@pytest.mark.parametrize("data", [Read, Stream])
def test_only_the_loader_is_waited_for_by_data_wait(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "time", CLOCK)
    callback, logger, saves = Throughput(), Kept(), Saves(fails_at=3)
    arguments: dict[str, Any] = {"devices": 1, "log_every_n_steps": 2, "max_steps": 6, "callbacks": [callback, saves]}
    failing, trainer = (L.Trainer(**{**QUIET, "logger": logger}, **arguments) for _ in range(2))
    with pytest.raises(RuntimeError, match="the disk is full"):
        failing.fit(Timed(), DataLoader(data(), batch_size=BATCH))
    saves.fails_at = None
    trainer.fit(Timed(), DataLoader(data(), batch_size=BATCH))
    for loop in (failing.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop):
        assert not {name for name in vars(loop) if name.endswith("_fetch")}
    rows = [row for row in logger.rows if "step_time" in row]
    assert len(rows) >= 2
    for row in rows:
        assert row["step_time"] == pytest.approx(STEP + 2.0)
        assert row["data_wait"] == pytest.approx(BATCH * READING / (STEP + 2.0))


@pytest.mark.parametrize(
    ("batch", "num_tokens"),
    [
        ({"numbers": torch.zeros(4, 7), "categories": torch.zeros(4, 13, dtype=torch.int64)}, 0),  # a table's row
        ({"labels": torch.zeros(4, 3).long(), "input_ids": torch.zeros(4, 5, dtype=torch.int32)}, 20),
        ({"inputs": torch.zeros(4, 5).long(), "num_bytes": torch.zeros(4).long()}, 20),
        ({"inputs": torch.zeros(4, 5)}, 0),
        ({"text": {"tokens": torch.zeros(2, 3).long()}, "image": (torch.zeros(2, 3), torch.zeros(2).long())}, 6),
        ((torch.zeros(4, 5).long(), torch.zeros(4, 6).long()), 20),
        (torch.zeros(4, 5).long(), 20),
        (torch.zeros(4, 5), 0),
    ],
)
def test_tokens_are_integers_that_no_name_says_are_something_else(batch: Any, num_tokens: int) -> None:
    assert throughput._num_tokens(batch) == num_tokens


def test_steps_that_are_no_number_are_refused() -> None:
    for every in (0, -1, 1.5, "3"):
        with pytest.raises(
            ValueError, match=re.escape(f"communication_every_n_steps={every!r}) is no number of steps")
        ):
            Throughput(communication_every_n_steps=every)  # type: ignore[arg-type]
