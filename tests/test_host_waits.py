"""The host runs ahead of the device: a steady step waits for no value that nobody reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.host_waits import READ, UPLOAD, HostWaits

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
