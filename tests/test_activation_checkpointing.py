"""Activation checkpointing: the numbers of one process without it, less memory, and what it runs again."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import Counter
from functools import partial
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from lightning_dist.parallel.activation_checkpoint import checkpoint_activations
from lightning_dist.patches import Patches
from tests.support import models
from tests.support.collectives import counting
from tests.support.models import WIDTH, few_samples, samples
from tests.support.parity import QUIET, Record, Run, assert_equal, once, one_process, train, trainer, whole_weights
from tests.support.ranks import RankError, run_on_ranks
from tests.support.reports import report_of_a_fit

pytestmark = pytest.mark.sampled

MODES = ["full", "selective"]
LAYOUTS = [("dp_shard=1", 1), ("dp_replicate=2", 2), ("dp_shard=2", 2)]
IDS = ["alone", "replicate2", "shard2"]
ACCUMULATING = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_steps": 4}


class Attending(nn.Module):
    """Attention, dropout, an activation in place, an argument by name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, -1)
        hidden = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.dropout(self.out(hidden).relu_()) * scale, scale.abs()


class Attended(models.Momentum):
    """Blocks over the four parts of a sample; a tensor that needs a gradient goes along by name."""

    dropout = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.net = nn.Linear(4, 4), nn.ModuleList(Attending() for _ in range(3))
        self.head = nn.Linear(WIDTH, models.CLASSES)
        self.scale = nn.Parameter(torch.ones(4))
        for block in self.net:
            block.dropout.p = self.dropout  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        scale, x = self.scale, self.stem(x.unflatten(1, (4, 4)))
        for block in self.net:  # type: ignore[union-attr]
            x, scale = block(x, scale=scale)
        return self.head(x.flatten(1))


class Dropping(Attended):
    dropout = 0.3


class NormedBlock(nn.Module):
    """BatchNorm, also one whose statistics are the mean over all batches, and a vector moved by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.norm, self.mean = nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH, momentum=None)
        self.register_buffer("seen", torch.zeros(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = self.seen + 1
        return x + self.mean(self.down(F.relu(self.norm(self.up(x)), inplace=True))) * self.seen[0, 0].sqrt()


class Normed(models.Momentum):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(NormedBlock(), NormedBlock(), nn.Linear(WIDTH, models.CLASSES))


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS, ids=IDS)
@pytest.mark.parametrize("mode", ["full", pytest.param("selective", marks=pytest.mark.slow)])
def test_training_equals_one_process_without_it(mode: str, layout: str, num_ranks: int) -> None:
    run = Run(Attended, samples, few_samples, trainer=ACCUMULATING, strategy={"activation_checkpointing": mode})
    one = one_process(run)
    for record in _records(run, layout, num_ranks):
        assert_equal(one, record)


def _records(run: Run, layout: str, num_ranks: int) -> list[Record]:
    return [train(run, layout)] if num_ranks == 1 else run_on_ranks(num_ranks, train, run, layout)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("module", [Dropping, Normed])
def test_random_numbers_and_statistics_are_those_without_it(module: Any, mode: str) -> None:
    plain, recomputing = (
        Run(module, samples, few_samples, trainer=ACCUMULATING, strategy={"activation_checkpointing": value})
        for value in ("none", mode)
    )
    one = once(train, plain, "dp_shard=1")
    _assert_same(one, train(recomputing, "dp_shard=1"))
    assert one.losses != one_process(Run(models.Momentum, samples, trainer=ACCUMULATING)).losses


@pytest.mark.parametrize("layout", ["dp_replicate=2", "dp_shard=2"])
def test_statistics_and_random_numbers_of_two_ranks_are_those_without_it(layout: str) -> None:
    for module in (Dropping, Normed):
        plain, full = (
            Run(module, samples, few_samples, trainer=ACCUMULATING, strategy={"activation_checkpointing": value})
            for value in ("none", "full")
        )
        for one, other in zip(_records(plain, layout, 2), _records(full, layout, 2), strict=True):
            _assert_same(one, other)


def _assert_same(one: Record, other: Record) -> None:
    torch.testing.assert_close(vars(other), vars(one), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["dp_replicate=2", "dp_shard=2"])
def test_16_bit_training_is_that_without_it(layout: str) -> None:
    for weights in run_on_ranks(2, _train_16_bit, layout):
        for precision in ("bf16-mixed", "16-mixed"):
            for mode in MODES:
                torch.testing.assert_close(weights[precision, mode], weights[precision, "none"], rtol=0, atol=0)


def _train_16_bit(layout: str) -> dict[tuple[str, str], dict[str, Tensor]]:
    weights = {}
    for precision in ("bf16-mixed", "16-mixed"):
        for mode in ("none", *MODES):
            L.seed_everything(1, verbose=False)
            module = Attended()
            plugins = [MixedPrecision(precision, "cpu")]  # type: ignore[arg-type]
            runner = trainer(layout, plugins=plugins, max_steps=3, strategy={"activation_checkpointing": mode})
            runner.fit(module, DataLoader(samples(), batch_size=4))
            weights[precision, mode] = whole_weights(module)
    return weights


@pytest.mark.parametrize("mode", ["full", pytest.param("selective", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["dp_replicate=2", "dp_shard=2"])
def test_compiled_blocks_train_as_plain_ones(layout: str, mode: str) -> None:
    options = {"compile": {"backend": "aot_eager"}, "activation_checkpointing": mode}
    one = one_process(Run(models.Momentum, samples, trainer=ACCUMULATING))
    for record in run_on_ranks(2, train, Run(models.Momentum, samples, trainer=ACCUMULATING, strategy=options), layout):
        assert_equal(one, record)


@pytest.mark.parametrize("mode", MODES)
def test_the_empty_cache_that_transformers_makes_is_not_filled_twice(mode: Any) -> None:
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, use_cache=True
    )
    model, tokens = LlamaForCausalLM(config), torch.randint(0, 64, (2, 8))
    gradients = []
    for value in ("none", mode):
        checkpoint_activations(model, dict(model.model.layers.named_children()), value, Patches())
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    with torch.no_grad():
        filled = model(input_ids=tokens).past_key_values
    assert isinstance(filled, DynamicCache)
    assert filled.get_seq_length() == 8
    with pytest.raises(ValueError, match="DynamicCache came with keys and values in it"):
        model(input_ids=tokens, past_key_values=filled)


# ---------------------------------------------------------------- what it runs, and what it keeps


class Counted(models.Block):
    calls: ClassVar[Counter[str]] = Counter()

    def forward(self, x: Tensor) -> Tensor:
        self.calls["training" if self.training else "validation"] += 1
        return super().forward(x)


class Counting(models.Momentum):
    def __init__(self) -> None:
        super().__init__()
        self.net.blocks = nn.ModuleList(Counted() for _ in range(3))


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS, ids=IDS)
def test_a_block_runs_twice_in_a_step_and_once_in_validation(layout: str, num_ranks: int) -> None:
    num_batches = 4 if num_ranks == 1 or "tp" in layout or "pp" in layout else 4 // num_ranks  # which data ranks share
    expected = {"training": 3 * 4 * 2, "validation": 3 * num_batches}
    counts = [_calls(layout)] if num_ranks == 1 else run_on_ranks(num_ranks, _calls, layout)
    assert counts == [(expected, {**expected, "training": 3 * 4})] * num_ranks


def _calls(layout: str) -> tuple[dict[str, int], dict[str, int]]:
    """Of a second fit with it, after one without; of a third without it again. All of the same module."""
    module, counts = Counting(), []
    for mode in ("none", "full", "none"):
        Counted.calls.clear()
        options = {"max_steps": 4, "num_sanity_val_steps": 0, "limit_val_batches": 4}
        runner = trainer(layout, **options, strategy={"activation_checkpointing": mode})
        runner.fit(module, DataLoader(samples(16), batch_size=4 // _world()), DataLoader(samples(), batch_size=4))
        counts.append(dict(Counted.calls))
    return counts[1], counts[2]


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class Kept(TorchDispatchMode):
    """Bytes that what ran inside allocated and that are still held, and how often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        output = func(*args, **(kwargs or {}))
        self.counts[func.overloadpacket.__name__] += 1
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return output

    @property
    def held(self) -> int:
        return sum(size for reference, size in self._storages.values() if not reference.expired())


def _step(mode: Any, batch: int = 64) -> tuple[int, Counter[str], Counter[str], list[Tensor]]:
    """Bytes held between forward and backward, operators of each, gradients."""
    torch.manual_seed(0)
    net = models.Net()
    checkpoint_activations(net, {f"blocks.{i}": block for i, block in enumerate(net.blocks)}, mode, Patches())
    x = torch.randn(batch, WIDTH)
    with Kept() as forward:
        loss = net(x).square().mean()
    held = forward.held
    with Kept() as backward:
        loss.backward()
    return held, forward.counts, backward.counts, [p.grad for p in net.parameters() if p.grad is not None]


def test_less_is_kept_for_backward() -> None:
    """A block of width w keeps 8 w a sample (norm, up, gelu, down); selective 4 w; full its input."""
    none, full, selective = (_step(mode)[0] for mode in ("none", *MODES))
    features = 64 * WIDTH * 4
    assert none - full >= 3 * 4 * features
    assert none - selective >= 3 * 2 * features
    assert full < selective < none


def test_selective_runs_no_matrix_product_again() -> None:
    _, forward, plain, gradients = _step("none")
    assert forward["addmm"] == 8
    for mode, again in (("full", 3 * 1), ("selective", 0)):  # torch stops before the last: nothing needs its result
        _, _, backward, others = _step(mode)
        assert backward["mm"] == plain["mm"]
        assert backward["addmm"] == again + plain["addmm"]
        assert backward["gelu"] == 3
        torch.testing.assert_close(others, gradients, rtol=0, atol=0)


def test_selective_keeps_the_result_of_attention() -> None:
    torch.manual_seed(0)
    block = Attending()
    counts = {}
    for mode in ("full", "selective"):
        checkpoint_activations(nn.ModuleList([block]), {"0": block}, mode, Patches())  # type: ignore[arg-type]
        output, _ = block(torch.randn(2, 4, 4), scale=torch.ones(4))
        with Kept() as backward:
            output.sum().backward()
        counts[mode] = sum(n for name, n in backward.counts.items() if "attention" in name and "backward" not in name)
    assert counts == {"full": 1, "selective": 0}


@pytest.mark.parametrize("layout", ["dp_replicate=2", "dp_shard=2"])
def test_collectives_are_those_without_it(layout: str) -> None:
    for none, *others in run_on_ranks(2, _collectives, layout):
        assert others == [none] * 5
        assert len(none) == 3
        assert none[-1]


def _collectives(layout: str) -> list[list[dict[str, int]]]:
    """Of each step, under each mode, plain and compiled."""
    counts: list[list[dict[str, int]]] = []
    for mode, compile in itertools.product(("none", *MODES), (False, {"backend": "aot_eager"})):
        counts.append([])
        strategy = counting("optimizer_step", counts[-1])(layout, activation_checkpointing=mode, compile=compile)  # type: ignore[arg-type]
        runner = L.Trainer(**QUIET, devices=2, strategy=strategy, max_steps=3, gradient_clip_val=0.1)
        runner.fit(models.Classifier(), DataLoader(samples(), batch_size=4))
    return counts


# ---------------------------------------------------------------- what it leaves as it was


def _recomputing(mode: Any) -> models.Net:
    net = models.Net()
    checkpoint_activations(net, {f"blocks.{i}": block for i, block in enumerate(net.blocks)}, mode, Patches())
    return net


@pytest.mark.parametrize("mode", MODES)
def test_names_copies_and_pickles_are_those_of_a_plain_module(mode: str) -> None:
    net = _recomputing(mode)
    assert list(net.state_dict()) == list(models.Net().state_dict())
    assert [name for name, _ in net.named_modules()] == [name for name, _ in models.Net().named_modules()]
    x = torch.randn(2, WIDTH)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with torch.no_grad():
            other.blocks[0].up.weight.zero_()
        assert other.blocks[0].forward.__self__ is other.blocks[0]
        assert not torch.equal(other(x), net(x))


def test_a_replaced_forward_is_wrapped_and_put_back() -> None:
    net = models.Net()
    first, second, third = net.blocks
    doubled = partial(_double, first)
    vars(first)["forward"] = doubled
    vars(second)["forward"] = _double_method.__get__(second)
    x = torch.randn(2, WIDTH)
    plain = net(x)
    for mode in ("full", "full", "selective", "none"):
        checkpoint_activations(net, dict(net.blocks.named_children()), mode, Patches())  # type: ignore[arg-type]
        torch.testing.assert_close(net(x), plain, rtol=0, atol=0)
    assert vars(first)["forward"] is doubled
    assert vars(second)["forward"].__func__ is _double_method
    assert "forward" not in vars(third)


def _double(block: nn.Module, x: Tensor) -> Tensor:
    return 2 * models.Block.forward(block, x)  # type: ignore[arg-type]


def _double_method(self: nn.Module, x: Tensor) -> Tensor:
    return _double(self, x)


def test_blocks_left_out_of_a_second_call_are_put_back() -> None:
    net = _recomputing("full")
    checkpoint_activations(net, {"blocks.1": net.blocks[1]}, "full", Patches())
    assert ["forward" in vars(block) for block in net.blocks] == [False, True, False]


# ---------------------------------------------------------------- refusals


def test_an_unknown_mode_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="activation_checkpointing is 'some'; it must be one of none, full, selective"):
        HybridStrategy(activation_checkpointing="some")  # type: ignore[arg-type]


def test_a_network_without_blocks_is_refused() -> None:
    runner = trainer("dp_shard=1", strategy={"activation_checkpointing": "full"})
    with pytest.raises(ValueError, match=r"recomputes the repeated blocks of a network, and Flat has none"):
        runner.fit(models.Flat(), DataLoader(samples(), batch_size=4))


class BuiltInSetup(models.Momentum):
    def __init__(self) -> None:
        super().__init__()
        del self.net

    def setup(self, stage: str) -> None:
        self.net = models.Net()


def test_blocks_built_in_the_setup_hook_are_found() -> None:
    options = {"activation_checkpointing": "full", "shard_units": ["net.blocks.*"]}
    runner = trainer("dp_shard=1", strategy=options, max_steps=1)
    runner.fit(BuiltInSetup(), DataLoader(samples(), batch_size=4))
    assert isinstance(runner.strategy, HybridStrategy)
    assert len(runner.strategy.parts.module_setup.recomputed_blocks) == 3


def test_evaluation_needs_no_blocks() -> None:
    runner = trainer("dp_shard=1", strategy={"activation_checkpointing": "full"})
    runner.validate(models.Flat(), DataLoader(samples(), batch_size=4), verbose=False)


class DeferredFlat(models.Flat):
    def configure_model(self) -> None:
        pass


def test_a_network_without_blocks_that_configure_model_builds_is_refused_at_setup() -> None:
    with pytest.raises(RankError, match="has none; name the modules with shard_units="):
        run_on_ranks(2, _fit_flat)


def _fit_flat() -> None:
    trainer("dp_shard=2", strategy={"activation_checkpointing": "full"}).fit(DeferredFlat(), DataLoader(samples(), 4))


def test_the_report_names_what_is_recomputed() -> None:
    strategy = HybridStrategy("dp_shard=1", activation_checkpointing="full")
    report = report_of_a_fit(models.Classifier(), DataLoader(samples(), batch_size=4), strategy, 1)
    cells = [cell for column in report.table().columns for cell in column.cells]
    assert "full: net.blocks.0, net.blocks.1, net.blocks.2" in cells
