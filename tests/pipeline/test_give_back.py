"""What a run under ``pp`` puts onto a module is taken off, and every rank has the whole of it again."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_dist import HybridStrategy
from lightning_dist.parallel.pipeline import partition_of
from tests.support.parity import QUIET
from tests.support.ranks import run_on_ranks
from tests.user_code.networks import Classifier
from tests.user_code.samples import loader, points


def _attributes(module: nn.Module) -> dict[str, set[str]]:
    found = {f"module {name}": set(vars(child)) for name, child in module.named_modules()}
    return found | {f"parameter {name}": set(vars(p)) for name, p in module.named_parameters()}


def _given_back(schedule: str | None) -> dict[str, Any]:
    L.seed_everything(3, verbose=False)
    module = Classifier()
    module.example_input_array = points()[0]
    before = _attributes(module)
    options: dict[str, Any] = {"devices": 1}
    if schedule is not None:
        strategy = HybridStrategy("pp=2", pipeline_schedule=schedule)
        options = {"devices": 2, "strategy": strategy}
    L.Trainer(**QUIET, **options, max_epochs=1).fit(module, loader(8))
    if schedule is not None:
        assert partition_of(module) is None
        assert all(type(p) is nn.Parameter for p in module.parameters())
        left = {name: own - before[name] - {"_hparams"} for name, own in _attributes(module).items()}
        assert not {name: names for name, names in left.items() if names}
        assert not any(child._forward_pre_hooks for child in module.modules())
        assert isinstance(module.example_input_array, torch.Tensor)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(module.net)))
    with torch.no_grad():
        return {"state": {k: v.clone() for k, v in module.state_dict().items()}, "called": copied(points()[0])}


@pytest.mark.parametrize("schedule", ["1F1B", pytest.param("Interleaved1F1B", marks=pytest.mark.slow)])
def test_the_module_is_the_users_again(schedule: str) -> None:
    alone = _given_back(None)
    for found in run_on_ranks(2, _given_back, schedule):
        assert found["state"].keys() == alone["state"].keys()
        for name, value in alone["state"].items():
            torch.testing.assert_close(found["state"][name], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["called"], alone["called"], rtol=1e-5, atol=1e-6)
