"""``pytest --device``: what it tells the pool of ranks and the Trainers."""

from __future__ import annotations

import pytest
import torch

from tests.support import device
from tests.support.ranks import RankPool, run_on_ranks


def _device_of_rank() -> tuple[str, str]:
    return device.device_type(), torch.distributed.get_backend()


def test_ranks_have_the_device_of_the_option(request: pytest.FixtureRequest) -> None:
    chosen = request.config.getoption("--device")
    ((told, backend),) = run_on_ranks(1, _device_of_rank)
    assert told == chosen
    assert "gloo" in backend


def test_a_test_that_takes_more_gpus_than_there_are_is_skipped_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.VARIABLE, "cuda")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(pytest.skip.Exception, match="takes 4 ranks on a cuda device each, and there are 2"):
        RankPool().run(4, _device_of_rank)
    device.skip_without(2)
