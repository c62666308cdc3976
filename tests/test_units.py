"""What is gathered at once under ``dp_shard``, and for how long: large layers, and ``reshard_after_forward``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from lightning_dist.fabric import HybridFabricStrategy
from lightning_dist.parallel import shard_options
from lightning_dist.parallel.fsdp_units import shard_units
from lightning_dist.parallel.shard_options import large_layers
from lightning_dist.plans import find_blocks
from tests.support import models
from tests.support.collectives import counting
from tests.support.models import BLOCK_PLAN, CLASSES, WIDTH, few_samples, samples
from tests.support.parity import QUIET, Run, assert_equal, assert_parity, one_process, slow, train, whole_weights
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

KEPT = {"reshard_after_forward": False}
ON_HOST = {"cpu_offload": True}


class LargeLayers(models.Momentum):
    """Every dense layer beside the blocks counts as large while a run lasts."""

    def setup(self, stage: str) -> None:
        shard_options.LARGE = 1

    def teardown(self, stage: str) -> None:
        shard_options.LARGE = 2**24


class UsedDirectly(LargeLayers):
    """The step uses weights whose layers it does not call, or has called; another is frozen, one unused."""

    def __init__(self) -> None:
        super().__init__()
        self.net.frozen, self.net.unused = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.net.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        net: Any = self.net
        x = net.frozen(net.stem(x))
        for block in net.blocks:
            x = block(x)
        return F.linear(net.norm(x), net.head.weight, net.head.bias) + net.stem.weight.square().mean()


class TiedLarge(models.Tied):
    """One weight of two layers, which stay in the root."""

    setup, teardown = LargeLayers.setup, LargeLayers.teardown


CLIPPED = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
PARITY = [
    ("dp_shard=2", 2, UsedDirectly, {}, {}),
    ("dp_shard=2", 2, TiedLarge, KEPT, {}),
    ("dp_shard=2", 2, models.Unused, KEPT, CLIPPED),
    ("pp=2,dp_shard=2", 4, LargeLayers, KEPT, CLIPPED),
    ("dp_shard=2", 2, models.Grouped, ON_HOST, CLIPPED),
    slow("dp_replicate=2,dp_shard=2", 4, models.Unused, ON_HOST, CLIPPED),
    slow("dp_shard=2", 2, models.Deferred, ON_HOST, {}),
    slow("dp_shard=2", 2, models.Frozen, ON_HOST, {}),
    ("dp_shard=2,tp=2", 4, LargeLayers, {**KEPT, "tensor_plan": BLOCK_PLAN}, CLIPPED),
    slow("dp_replicate=2,dp_shard=2", 4, UsedDirectly, KEPT, CLIPPED),
    slow("dp_shard=2", 2, LargeLayers, {"activation_checkpointing": "full"}, CLIPPED),
    slow("dp_shard=2", 2, models.Adversarial, KEPT, {}),
]


@pytest.mark.parametrize(("layout", "num_ranks", "module", "strategy", "trainer"), PARITY)
def test_trains_as_one_process(layout: str, num_ranks: int, module: Any, strategy: Any, trainer: Any) -> None:
    if module is models.Adversarial:  # which clips itself, without a norm to compare
        run = Run(module, samples, strategy=strategy)
        one = one_process(run)
        for record in run_on_ranks(num_ranks, train, run, layout):
            assert_equal(one, record)
        return
    assert_parity(Run(module, samples, few_samples, strategy=strategy, trainer=trainer), layout, num_ranks)


# root, three blocks forward and back; of the stem and the head, the head stays gathered from forward to backward
GATHERS = [(models.Momentum, {}, 7), (models.Momentum, KEPT, 4), (LargeLayers, {}, 10), (LargeLayers, KEPT, 6)]


@pytest.mark.parametrize(("module", "strategy", "expected"), GATHERS)
def test_a_unit_that_stays_gathered_is_not_gathered_for_its_backward(module: Any, strategy: Any, expected: int) -> None:
    assert run_on_ranks(2, _gathers, module, strategy) == [[expected] * 3] * 2


def _gathers(module: Any, options: dict[str, Any]) -> list[int]:
    counts: list[dict[str, int]] = []
    strategy = counting("optimizer_step", counts)("dp_shard=2", **options)
    L.Trainer(**QUIET, devices=2, strategy=strategy, max_steps=3).fit(module(), DataLoader(samples(), batch_size=4))
    return [count["all-gather"] for count in counts]


def test_large_layers_beside_the_blocks_are_units_where_nothing_shares_their_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_options, "LARGE", WIDTH * CLASSES)
    for module, expected in ((UsedDirectly(), ["stem", "head", "frozen"]), (TiedLarge(), [])):
        layers = large_layers(module, find_blocks(module))
        assert list(shard_units(module, layers)) == [f"net.{name}" for name in expected]
    assert not large_layers(models.Flat(), {})


def test_explain_tells_of_large_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_options, "LARGE", WIDTH * WIDTH)
    for options, units in (({}, ["net.stem"]), ({"shard_units": ["Block"]}, [])):
        report = HybridStrategy("dp_shard=2", **options).explain(models.Classifier(), 2)  # type: ignore[arg-type]
        assert report.units == [*(f"net.blocks.{i}" for i in range(3)), *units]


def test_a_checkpoint_goes_on_with_and_without(tmp_path: Path) -> None:
    run = Run(LargeLayers, samples)
    one = one_process(run)
    for record in run_on_ranks(2, _resumed, str(tmp_path / "half.ckpt")):
        for name, weight in one.weights.items():
            torch.testing.assert_close(record[name], weight, rtol=1e-4, atol=1e-5)


def _resumed(path: str) -> dict[str, Tensor]:
    for options, steps in (({}, 4), ({**KEPT, **ON_HOST}, -1)):
        L.seed_everything(1, verbose=False)
        module = (models.Momentum if steps == 4 else LargeLayers)()
        strategy = HybridStrategy("dp_shard=2", **options)
        trainer = L.Trainer(**QUIET, devices=2, strategy=strategy, max_steps=steps, max_epochs=1)
        loader = DataLoader(samples(), batch_size=4)
        trainer.fit(module, loader, ckpt_path=None if steps == 4 else path)
        if steps == 4:
            trainer.save_checkpoint(path)
    return whole_weights(module)


@pytest.mark.parametrize("strategy", [HybridStrategy, HybridFabricStrategy])
def test_torch_s_sizes_to_reshard_to_are_refused(strategy: Any) -> None:
    with pytest.raises(ValueError, match=re.escape("reshard_after_forward is 2; it must be one of True, False")):
        strategy("dp_shard=4", reshard_after_forward=2)


@pytest.mark.parametrize("layout", ["dp_replicate=2", "dp_shard=2,tp=2", "pp=2,dp_shard=2"])
def test_offload_is_refused_where_nothing_or_another_axis_divides(layout: str) -> None:
    strategy = HybridStrategy(layout, cpu_offload=True)
    with pytest.raises(ValueError, match=re.escape(f"cpu_offload=True under layout {layout}: ")):
        L.Trainer(**QUIET, devices=2 ** layout.count("="), strategy=strategy)
