"""The host runs ahead of the device: a steady step waits for no value that nobody reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from lightning_dist.compat.lightning import Metadata, Sync
from lightning_dist.logs.reductions import LoggedValue, all_reduce_logged
from tests.support import models
from tests.support.host_waits import READ, UPLOAD, HostWaits, hosts_apart
from tests.support.models import BLOCK_PLAN, samples
from tests.support.parity import QUIET, slow
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

DEVICE = torch.device("cpu")


def _in_backward() -> None:
    leaf = torch.ones(2, device=DEVICE, requires_grad=True)
    leaf.register_hook(lambda gradient: gradient * len(gradient.tolist()))
    (2 * leaf).sum().backward()


_ON_DEVICE = torch.ones(3)  # made while nobody counts


@pytest.mark.parametrize(
    ("asks", "kind"),
    [
        (lambda x: x.sum().item(), READ),
        (lambda x: float(x[0]), READ),
        (lambda x: x.tolist(), READ),
        (lambda x: bool(x.isfinite().all()), READ),
        (lambda x: [0, 1, 2][x.long()[0]], READ),
        (lambda x: x.cpu(), READ),
        (lambda x: x.to("cpu"), READ),
        (lambda x: x.numpy(), READ),
        (lambda x: x[x > 0], READ),
        (lambda x: x.nonzero(), READ),
        (lambda x: x.unique(), READ),
        (lambda x: torch.equal(x, x), READ),
        (lambda x: torch.zeros(3, device="cpu").copy_(x), READ),
        (lambda _: _in_backward(), READ),
        (lambda _: torch.tensor([1, 2], device=DEVICE), UPLOAD),
        (lambda x: x.new_tensor([1.0]), UPLOAD),
        (lambda _: torch.zeros(3).to(DEVICE), UPLOAD),
        (lambda x: x.copy_(torch.tensor([1.0, 2.0, 3.0])), UPLOAD),
    ],
)
def test_what_the_host_waits_for_is_counted_once(asks: Callable[[Tensor], Any], kind: str) -> None:
    with HostWaits() as seen:
        asks(_ON_DEVICE)
    assert seen.count == {kind: 1}
    assert "test_host_waits.py" in str(seen)


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: (x * 2).sum().sqrt(),
        lambda x: torch.full((), 2.0, device=DEVICE) + x,
        lambda x: x.to("cpu", non_blocking=True).tolist(),
        lambda x: torch.tensor([1, 2]).sum().item(),
        lambda x: torch.randperm(3, device="cpu").tolist(),
        lambda x: x.masked_fill(x > 0, 0.0),
        lambda x: x.to(torch.float64),
    ],
)
def test_what_the_host_does_not_wait_for_is_not_counted(asks: Callable[[Tensor], Any]) -> None:
    with HostWaits() as seen:
        asks(_ON_DEVICE)
    assert not seen.count, str(seen)


# ---------------------------------------------------------------- the steps of a run


@dataclass(frozen=True)
class Logs:
    """How a step logs, and who reads it: nobody but where a logger writes, at every second step, or a progress bar."""

    sync: bool = False
    every: int = 1000
    bar: bool = False
    scales: bool = False
    """Whether the loss is scaled, for half precision."""


class Logging(models.Classifier):
    """Trains in one line, and logs as it is told."""

    def __init__(self, logs: Logs) -> None:
        super().__init__()
        self.logs = logs

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss, self.logs.bar, sync_dist=self.logs.sync, on_step=True, on_epoch=True)
        return loss


class Counting(L.Callback):
    """Counts from the start of one batch to that of the next, hooks and logs included."""

    def __init__(self) -> None:
        self.steps: list[HostWaits] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.on_train_end()
        self.steps.append(HostWaits().__enter__())

    def on_train_end(self, *args: Any) -> None:
        if self.steps:
            self.steps[-1].__exit__(None, None, None)


class Bar(ProgressBar):
    """Reads what it would show after each batch, on each rank."""

    def disable(self) -> None:
        """Not on any."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:  # type: ignore[override]
        assert isinstance(self.get_metrics(trainer, pl_module)["loss_step"], float)


class Reading(L.pytorch.loggers.Logger):
    """Reads each value, as all loggers do."""

    name = version = "reading"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert all(isinstance(value, float | int) for value in metrics.values())

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """None."""


def _waits(layout: str | None, logs: Logs) -> list[tuple[int, str]]:
    """The number of waits of each batch once all is warm, and their places."""
    counting = Counting()
    devices, strategy = 1, "auto"
    if layout is not None:
        devices = dist.get_world_size()
        plan, reshards = BLOCK_PLAN if "tp" in layout else None, "pp=2,dp_shard" in layout
        strategy = HybridStrategy(layout, tensor_plan=plan, pipeline_reshard=reshards)  # type: ignore[assignment]
    of_run = {"log_every_n_steps": logs.every, "max_epochs": 1, "devices": devices, "strategy": strategy}
    callbacks = [counting, *([Bar()] if logs.bar else [])]
    of_run |= {"enable_progress_bar": logs.bar, "callbacks": callbacks}
    training = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "logger": Reading()}
    plugins = [MixedPrecision("16-mixed", "cpu")] if logs.scales else None
    with hosts_apart():
        L.Trainer(**{**QUIET, **of_run, **training}, plugins=plugins).fit(
            Logging(logs), DataLoader(samples(), batch_size=4)
        )
    return [(seen.count.total(), str(seen)) for seen in counting.steps[3:7]]


@pytest.mark.parametrize(
    "logs", [Logs(), Logs(sync=True), Logs(every=2), Logs(bar=True)], ids=["logs", "syncs", "read", "bar"]
)
@pytest.mark.parametrize(
    ("layout", "num_ranks"),
    [
        ("dp_replicate=2", 2),
        ("dp_shard=2", 2),
        ("tp=2", 2),
        slow("dp_shard=2,tp=2", 4),
        ("pp=2", 2),
        slow("pp=2,dp_replicate=2", 4),
    ],
)
def test_a_steady_step_waits_as_often_as_in_one_process(layout: str, num_ranks: int, logs: Logs) -> None:
    of_one = [number for number, _ in _waits(None, logs)]
    assert min(of_one) > 0 if logs.bar else (sum(of_one) > 0) == (logs.every == 2)
    for rank in run_on_ranks(num_ranks, _waits, layout, logs):
        assert [number for number, _ in rank] == of_one, "\n".join(places for _, places in rank)


@pytest.mark.parametrize(
    ("layout", "num_ranks"),
    [("pp=2", 2), slow("pp=2,dp_shard=2", 4), slow("pp=2,dp_replicate=2", 4)],
)
def test_a_step_in_half_precision_waits_as_often_as_in_one_process(layout: str, num_ranks: int) -> None:
    """A scaler looks at gradients before it lets an optimizer step."""
    of_one = [number for number, _ in _waits(None, Logs(scales=True))]
    assert sum(of_one) > 0
    for rank in run_on_ranks(num_ranks, _waits, layout, Logs(scales=True)):
        assert [number for number, _ in rank] == of_one, "\n".join(places for _, places in rank)


# ---------------------------------------------------------------- what is read late


class Parting(models.Momentum):
    """From a batch on, ranks run its blocks in different orders."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first, self.num_batches = first, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.num_batches += 1
        x, y = batch
        blocks = list(self.net.blocks)  # type: ignore[arg-type]
        for block in blocks[:: -1 if batch_idx >= self.first and dist.get_rank() else 1]:
            x = block(x)
        return F.cross_entropy(self.net.head(x), y)  # type: ignore[operator]


def _parted(first: int, folder: str | None) -> tuple[str, int, list[str]]:
    """What was raised, in which batch, and what was saved by then."""
    module = Parting(first)
    saves = [] if folder is None else [ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)]
    quiet = {**QUIET, "enable_checkpointing": folder is not None, "devices": 2, "max_epochs": 1}
    trainer = L.Trainer(**quiet, strategy=HybridStrategy("dp_shard=2"), callbacks=saves)
    with pytest.raises(RuntimeError, match="every rank has to run the same blocks in a step") as error:
        trainer.fit(module, DataLoader(samples(32), batch_size=4))
    return str(error.value), module.num_batches, sorted(path.name for path in Path(folder or "").glob("*.ckpt"))


@pytest.mark.parametrize(
    ("first", "saves", "found"),
    [(0, False, 1), (1, False, 3), (3, False, 4), (2, True, 3)],
    ids=["at once in the first step", "a step later", "at the end", "before a checkpoint"],
)
def test_ranks_that_run_other_blocks_are_all_told(tmp_path: Path, first: int, saves: bool, found: int) -> None:
    ranks = run_on_ranks(2, _parted, first, str(tmp_path) if saves else None)
    for message, num_batches, files in ranks:
        assert message.startswith("under dp_shard every rank has to run the same blocks in a step, in the same order")
        assert num_batches == found
        assert files == ([f"epoch=0-step={step}.ckpt" for step in (1, 2)] if saves else [])


# ---------------------------------------------------------------- names of logged values


def _reduced(num_values: int, others: bool) -> list[dict[str, float]]:
    """By a group that the hosts have for themselves, and by that of the devices."""
    rank, hosts = dist.get_rank(), dist.new_group(backend="gloo")
    names = [f"value {number}" for number in range(num_values)] + [f"of {rank}"] * others
    values = {}
    for number, name in enumerate(names):
        reduce_fx = (torch.mean, torch.sum, torch.max)[number % 3]
        meta = Metadata("training_step", name, on_step=True, on_epoch=False, reduce_fx=reduce_fx)
        meta.sync = Sync()
        values[name] = LoggedValue.of(meta, torch.tensor(float(number + rank)), 1 + rank)
    reduced = []
    for group in (hosts, None):
        with HostWaits() as seen:
            of_all = all_reduce_logged(values, dist.group.WORLD, DEVICE, hosts=group)
        assert others or group is None or not seen.count, str(seen)
        reduced.append({name: float(value) for name, (_, value) in of_all.items() if value is not None})
    return reduced


@pytest.mark.parametrize(("num_values", "others"), [(3, False), (3, True), (70, False), (0, True)])
def test_hosts_that_agree_on_names_give_the_same_values(num_values: int, others: bool) -> None:
    ranks = run_on_ranks(2, _reduced, num_values, others)
    one, *rest = (reduced for rank in ranks for reduced in rank)
    assert all(reduced == one for reduced in rest)
    assert len(one) == num_values + 2 * others
