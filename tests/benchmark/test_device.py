"""Which device is measured."""

import pytest
import torch

from recipes.benchmark.device import device_type, rank_device, synchronize
from tests.support.ranks import run_on_ranks


@pytest.fixture
def two_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_accelerators")
def test_auto_takes_accelerators_where_there_is_one_a_rank() -> None:
    assert device_type("auto", 2) == "cuda"
    assert device_type("accelerator", 1) == "cuda"
    assert device_type("cpu", 2) == "cpu"
    assert device_type("auto", 3) == "cpu"


@pytest.mark.usefixtures("two_accelerators")
def test_too_few_accelerators_are_refused() -> None:
    with pytest.raises(ValueError, match="with 3 ranks: this machine has 2; pass --device cpu"):
        device_type("accelerator", 3)


def _devices() -> tuple[str, str, int]:
    """Of a rank of gloo, and of one of another backend; and how often the second waits for its device."""
    waits: list[None] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        patch.setattr(torch.accelerator, "current_device_index", lambda: 1)
        patch.setattr(torch.accelerator, "synchronize", lambda: waits.append(None))
        synchronize()
        before = str(rank_device())
        patch.setattr(torch.distributed, "get_backend", lambda: "nccl")
        synchronize()
        return before, str(rank_device()), len(waits)


def test_a_rank_is_on_the_device_of_its_process_group_and_waits_for_it() -> None:
    assert run_on_ranks(1, _devices) == [("cpu", "cuda:1", 1)]
