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
from lightning_dist.compat.distributed import param_groups_of
from lightning_dist.fabric import HybridFabricStrategy
from lightning_dist.parallel import shard_options
from lightning_dist.parallel.fsdp_units import shard_units
from lightning_dist.parallel.shard_options import large_layers, parts_of_blocks
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


class UsesWeights(models.Block):
    """Multiplies with the weight of a layer that it does not call."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(F.linear(self.norm(x), self.up.weight, self.up.bias)))


class OfLayers(models.Momentum):
    """Blocks of torch, of one that uses weights of a layer directly, and some that share a weight with another."""

    def __init__(self) -> None:
        super().__init__()
        net: Any = self.net
        net.blocks[1] = UsesWeights()
        net.blocks[2].up.weight = net.blocks[0].up.weight
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
        net.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        net: Any = self.net
        x = net.encoder(net.stem(x)[:, None])[:, 0]
        for block in net.blocks:
            x = block(x)
        return net.head(net.norm(x))


SPLIT = {"max_unit_parameters": 600, "prefetch_units": 2}
WITH_TENSOR = {**SPLIT, "max_unit_parameters": 300, "tensor_plan": BLOCK_PLAN}
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
    ("dp_shard=2", 2, OfLayers, SPLIT, CLIPPED),
    ("pp=2,dp_shard=2", 4, models.Momentum, SPLIT, CLIPPED),
    slow("dp_shard=2", 2, OfLayers, {**SPLIT, "activation_checkpointing": "full"}, {}),
    slow("dp_shard=2,tp=2", 4, models.Momentum, WITH_TENSOR, CLIPPED),
    slow("dp_replicate=2,dp_shard=2", 4, models.Unused, SPLIT, CLIPPED),
    slow("dp_shard=2", 2, models.Deferred, SPLIT, {}),
    slow("dp_shard=2", 2, models.Frozen, SPLIT, CLIPPED),
    slow("dp_shard=2", 2, models.Momentum, {**SPLIT, "compile": True}, {}),
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


def test_a_block_above_the_limit_is_divided_until_what_is_left_fits() -> None:
    module = OfLayers()
    blocks = find_blocks(module)
    for limit in (None, 100, 600, 1200):
        parts = parts_of_blocks(blocks, limit)
        units = {**blocks, **parts}
        for name, unit in units.items():
            inside = [other for key, other in parts.items() if key.startswith(f"{name}.")]
            apart = {p for other in inside for p in other.parameters()}
            left = sum(p.numel() for p in unit.parameters() if p not in apart)
            is_layer = isinstance(unit, (nn.Linear, nn.MultiheadAttention))
            assert limit is None or left <= limit or is_layer, f"{name} keeps {left}"
            whole = sum(p.numel() for p in unit.parameters())
            assert not inside or (limit is not None and whole > limit), f"{name} of {whole} is divided"
    assert not parts_of_blocks(blocks, None)


def test_units_are_gathered_ahead_in_their_order() -> None:
    one, two = (run_on_ranks(2, _order_of_gathers, number)[0] for number in (1, 2))
    assert sorted(one) == sorted(two)
    assert one[:4] == ["gather 0", "run 0", "gather 1", "run 1"]
    assert two[:5] == ["gather 0", "gather 1", "gather 2", "run 0", "run 1"]


def _order_of_gathers(number: int) -> list[str]:
    """In a forward: when the gathering of each block began, and when each ran."""
    events: list[str] = []

    class Noting(models.Momentum):
        def on_train_start(self) -> None:
            net: Any = self.net
            for index, block in enumerate(net.blocks):
                group = param_groups_of(block)[0]
                gather = group.unshard

                def noted(*args: Any, index: int = index, gather: Any = gather, group: Any = group) -> None:
                    if not group.is_unsharded and group._all_gather_result is None:
                        events.append(f"gather {index}")
                    gather(*args)

                group.unshard = noted
                block.up.register_forward_pre_hook(lambda *_, index=index: events.append(f"run {index}"))

        def on_before_backward(self, loss: Tensor) -> None:
            events.append("end")

    strategy = HybridStrategy("dp_shard=2", prefetch_units=number)
    L.Trainer(**QUIET, devices=2, strategy=strategy, max_steps=1).fit(Noting(), DataLoader(samples(), batch_size=4))
    return events[: events.index("end")]


@pytest.mark.parametrize("strategy", [HybridStrategy, HybridFabricStrategy])
@pytest.mark.parametrize("option", ["max_unit_parameters", "prefetch_units"])
def test_what_is_no_number_of_units_is_refused(strategy: Any, option: str) -> None:
    for value in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"{option} is {value}; it must be a whole number of at least 1"):
            strategy("dp_shard=2", **{option: value})
    with pytest.raises(ValueError, match="max_unit_parameters=8 with cpu_offload=True"):
        L.Trainer(**QUIET, devices=2, strategy=HybridStrategy("dp_shard=2", max_unit_parameters=8, cpu_offload=True))


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
