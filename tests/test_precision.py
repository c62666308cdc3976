"""16-bit training: what is gathered and reduced in which dtype, and that ranks skip a step together."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from tests import models
from tests.models import samples
from tests.parity import QUIET
from tests.ranks import run_on_ranks

LAYOUTS = ["dp_replicate=2", "dp_shard=2"]


class Overflowing(models.Momentum):
    """The gradient of one element is infinite, in one step and on the data that one rank sees."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1 and self.trainer.global_rank == self.trainer.world_size - 1:
            loss = loss + self.net.head.bias[-1].float() * float("inf")
        return loss


@pytest.mark.parametrize(("layout", "num_ranks"), [*((layout, 2) for layout in LAYOUTS), ("pp=2", 2), ("pp=4", 4)])
def test_an_overflow_on_one_rank_skips_the_step_on_all(layout: str, num_ranks: int) -> None:
    one = _scaled("dp_shard=1")
    for scale, weights in run_on_ranks(num_ranks, _scaled, layout):
        assert scale == one[0] == 2.0**15  # halved once
        for name, weight in one[1].items():
            assert weights[name].isfinite().all()
            torch.testing.assert_close(weights[name], weight, rtol=2e-2, atol=2e-3, msg=name)


def _scaled(layout: str) -> tuple[float, dict[str, torch.Tensor]]:
    from tests.parity import whole_weights

    L.seed_everything(1, verbose=False)
    world = dist.get_world_size() if dist.is_initialized() else 1
    plugin = MixedPrecision("16-mixed", "cpu")
    module, strategy = Overflowing(), HybridStrategy(layout)
    trainer = L.Trainer(
        **QUIET,
        devices=world,
        strategy=strategy,
        plugins=[plugin],
        max_steps=6,
        gradient_clip_val=0.5,
    )
    trainer.fit(module, DataLoader(samples(), batch_size=8 // strategy.num_data_ranks))
    assert plugin.scaler is not None
    return plugin.scaler.get_scale(), whole_weights(module)


class Measuring(models.Momentum):
    """Looks at all gradients when they are unscaled."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        norms = [p.grad.norm() for p in self.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack(norms).norm()))


def _norms(layout: str) -> list[float]:
    L.seed_everything(1, verbose=False)
    world = dist.get_world_size() if dist.is_initialized() else 1
    module, strategy = Measuring(), HybridStrategy(layout)
    plugins: Any = [MixedPrecision("16-mixed", "cpu")]
    trainer = L.Trainer(**QUIET, devices=world, strategy=strategy, plugins=plugins, max_steps=4)
    trainer.fit(module, DataLoader(samples(), batch_size=8))
    return module.norms


def test_hooks_see_unscaled_gradients_of_all_stages() -> None:
    one = _norms("dp_shard=1")
    for norms in run_on_ranks(2, _norms, "pp=2"):
        assert norms == pytest.approx(one, rel=2e-2)


@pytest.mark.parametrize(
    ("precision", "kept", "gathered", "seen"),
    [
        ("32-true", torch.float32, torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16, torch.bfloat16),
        ("bf16-true", torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("64-true", torch.float64, torch.float64, torch.float64),
    ],
)
def test_dtypes_of_sharded_parameters(
    precision: str, kept: torch.dtype, gathered: torch.dtype, seen: torch.dtype
) -> None:
    assert run_on_ranks(2, _dtypes, precision)[0] == (kept, kept, gathered, seen)


class Looking(models.Momentum):
    """Notes what a layer inside a block sees in its forward pass."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        layer = self.net.blocks[0].up

        def look(module: Any, args: Any, output: torch.Tensor) -> None:
            self.dtypes = module.weight.dtype, output.dtype

        handle = layer.register_forward_hook(look)
        dtype = next(iter(self.parameters())).dtype
        loss = super().training_step(
            [batch[0].to(torch.float64 if dtype == torch.float64 else batch[0].dtype), batch[1]], 0
        )
        handle.remove()
        return loss


def _dtypes(precision: Any) -> tuple[torch.dtype, ...]:
    module = Looking()
    trainer = L.Trainer(**QUIET, devices=2, strategy=HybridStrategy("dp_shard=2"), precision=precision, max_steps=1)
    trainer.fit(module, DataLoader(samples(), batch_size=4))
    weight = module.net.blocks[0].up.weight
    assert isinstance(weight, DTensor)
    assert weight.grad is not None
    return weight.dtype, weight.grad.dtype, *module.dtypes
