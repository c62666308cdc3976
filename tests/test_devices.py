"""What a step gives to collectives lies on the device, seen without one: ``FakeTensorMode`` stands for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_dist import Layout, placeholder
from lightning_dist.data import validate_same_batches
from lightning_dist.gradients import clip_by_norm, global_norm
from lightning_dist.placeholder import placeholder_parameter
from lightning_dist.precision import rounds_products
from lightning_dist.ranks import LayoutRanks

GPU = torch.device("cuda", 0)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """Those of what all-reduces were given, on a rank of two."""
    seen: list[torch.device] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *_, **__: seen.append(tensor.device))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield seen
    dist.destroy_process_group()


def test_a_stage_without_gradients_adds_to_the_norm_on_its_device(devices: list[torch.device]) -> None:
    elsewhere = placeholder_parameter(nn.Parameter(torch.ones(2)), GPU)
    with FakeTensorMode():
        assert global_norm([elsewhere]).device == GPU
    assert devices == [GPU]


def test_batches_without_tensors_are_compared_on_the_device(devices: list[torch.device]) -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):  # the answer is read
        validate_same_batches("training_step", (["words"],), dist.group.WORLD, GPU)
    assert devices == [GPU]


def test_gradients_on_the_host_and_on_the_device_are_clipped_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placeholder, "FakeTensor", type("OfAnotherStage", (), {}))  # there are none
    with FakeTensorMode():  # plain ones: nothing is communicated
        parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device=GPU))]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        assert clip_by_norm(parameters, 1.0).device.type == "cpu"
        assert [str(p.grad.device) for p in parameters if p.grad is not None] == ["cpu", "cuda:0"]


def test_what_lies_on_the_host_travels_beside_what_lies_on_the_device() -> None:
    ranks = LayoutRanks(Layout.parse("dp_shard=2"), backend="nccl", on_host=True)
    assert ranks.backend == "nccl"
    ranks.device = GPU
    assert ranks.backend == "cpu:gloo,cuda:nccl"


def _tf32() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def _autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@contextmanager
def _settings_kept() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("change", [_tf32, lambda: torch.set_float32_matmul_precision("high")])
def test_products_that_the_user_rounds_are_known_by_each_setting(change: Callable[[], None]) -> None:
    """Once ``fp32_precision`` was set, torch refuses to tell the other setting (torch 2.14)."""
    with _settings_kept():
        assert not rounds_products("cpu")
        change()
        assert rounds_products("cpu")
    with _autocast():
        assert rounds_products("cpu")
