"""After a fit the module is there as a whole: to be called, saved, copied, and read."""

from __future__ import annotations

import copy
import io
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_dist import HybridStrategy
from tests.support.parity import QUIET, once
from tests.support.ranks import run_on_ranks
from tests.user_code.networks import Classifier
from tests.user_code.samples import loader, points


def _used(layout: str | None) -> dict[str, Any]:
    """What can be had of a module after its fit, by what asked for it; a sentence where that was refused."""
    L.seed_everything(3, verbose=False)
    module = Classifier()
    world = torch.distributed.get_world_size() if layout else 1
    strategy: Any = "auto" if layout is None else HybridStrategy(layout)
    trainer = L.Trainer(**QUIET, devices=world, max_epochs=1, strategy=strategy)
    data = 2 if layout is not None and "dp_" in layout else 1
    trainer.fit(module, loader(8 // data))
    found: dict[str, Any] = {"saved": _saved(module)}
    found["norm"] = float(torch.stack([p.detach().norm() for p in module.parameters()]).norm())
    found["first"] = module.net.stem.weight.detach()[0].sum().item()
    found["copy"] = float(sum(p.detach().abs().sum() for p in copy.deepcopy(module).parameters()))
    try:
        with torch.no_grad():
            found["called"] = module(points()[0]).clone()
    except RuntimeError as error:
        found["called"] = str(error)
    return found


def _saved(module: L.LightningModule) -> dict[str, Tensor]:
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


@pytest.mark.parametrize(
    "layout",
    ["pp=2", *(pytest.param(f"pp=2,{axis}=2", marks=pytest.mark.slow) for axis in ("dp_replicate", "dp_shard", "tp"))],
)
def test_the_module_is_whole_on_every_rank(layout: str) -> None:
    whole = once(_used, None)
    for found in run_on_ranks(2 if layout == "pp=2" else 4, _used, layout):
        assert found["saved"].keys() == whole["saved"].keys()
        for name, value in whole["saved"].items():
            torch.testing.assert_close(found["saved"][name], value, rtol=1e-5, atol=1e-6)
        for name in ("norm", "first", "copy"):
            assert found[name] == pytest.approx(whole[name], rel=1e-5)
        if "dp_shard" in layout or "tp" in layout:
            assert "calls a Net outside of a step" in found["called"]
        else:
            torch.testing.assert_close(found["called"], whole["called"], rtol=1e-5, atol=1e-6)
