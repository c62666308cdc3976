"""The host runs ahead of the device: a steady step waits for no value that nobody reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from tests.support import models
from tests.support.host_waits import READ, UPLOAD, HostWaits
from tests.support.models import BLOCK_PLAN, samples
from tests.support.parity import QUIET, slow
from tests.support.ranks import RankError, run_on_ranks

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
    """How a step logs, and who reads it: nobody but where a logger writes, at every second step."""

    sync: bool = False
    every: int = 1000


class Logging(models.Classifier):
    """Trains in one line, and logs as it is told."""

    def __init__(self, logs: Logs) -> None:
        super().__init__()
        self.logs = logs

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss, sync_dist=self.logs.sync, on_step=True, on_epoch=True)
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
        strategy = HybridStrategy(layout, tensor_plan=BLOCK_PLAN if "tp" in layout else None)  # type: ignore[assignment]
    of_run = {"log_every_n_steps": logs.every, "max_epochs": 1, "devices": devices, "strategy": strategy}
    training = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "callbacks": [counting], "logger": Reading()}
    L.Trainer(**{**QUIET, **of_run, **training}).fit(Logging(logs), DataLoader(samples(), batch_size=4))
    return [(seen.count.total(), str(seen)) for seen in counting.steps[3:7]]


@pytest.mark.parametrize("logs", [Logs(), Logs(sync=True), Logs(every=2)], ids=["logs", "syncs", "read"])
@pytest.mark.parametrize(
    ("layout", "num_ranks"), [("dp_replicate=2", 2), ("dp_shard=2", 2), ("tp=2", 2), slow("dp_shard=2,tp=2", 4)]
)
def test_a_steady_step_waits_as_often_as_in_one_process(layout: str, num_ranks: int, logs: Logs) -> None:
    of_one = [number for number, _ in _waits(None, logs)]
    assert (sum(of_one) > 0) == (logs.every == 2)
    for rank in run_on_ranks(num_ranks, _waits, layout, logs):
        assert [number for number, _ in rank] == of_one, "\n".join(places for _, places in rank)
