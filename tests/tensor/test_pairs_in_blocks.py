"""Feed-forward layers that lie in a block beside attention and norms: divided, with the numbers of one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_dist.parallel.tensor.region import Region
from lightning_dist.plans.tensor import Split, find_tensor_plan
from tests.support.models import CLASSES, WIDTH, Classifier, samples
from tests.support.parity import Run, on_layout, one_process, slow
from tests.support.ranks import RankError, run_on_ranks
from tests.tensor.networks import divided_copy, whole

HIDDEN = 3 * WIDTH
Between = Callable[[Any, Tensor], Tensor]


def _relu(block: Any, hidden: Tensor) -> Tensor:
    return F.dropout(hidden.relu(), block.activation_dropout, block.training)


class Block(nn.Module):
    """As of OPT, without its attention: a residual, a norm, and what is ``between`` the layers."""

    def __init__(self, between: Between = _relu, dropout: float = 0.0, extra: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.scales = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.between, self.activation_dropout = between, dropout
        self.extra = extra

    def relu(self, hidden: Tensor) -> Tensor:
        """By its name of one element, and whatever a test has in its place."""
        return self.between(self, hidden)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.relu(self.fc1(self.norm(x).reshape(-1, WIDTH)))
        return x + self.scales[0] * self.fc2(hidden).view(x.shape)


class Network(Classifier):
    """``aside`` also reads the hidden features of the first block from outside."""

    def __init__(self, aside: bool = False, between: Between = _relu) -> None:
        super().__init__(1e-3)
        blocks = nn.Sequential(*(Block(between) for _ in range(3)))
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), blocks, nn.Linear(WIDTH, CLASSES))
        self.aside = aside

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if not self.aside:
            return loss
        block: Any = self.net[1][0]  # type: ignore[index]
        return loss + 0.1 * block.fc2(block.fc1(batch[0]).softmax(-1)).square().mean()


class Recomputing(Block):
    """Computes its feed-forward again by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.feed_forward, x, use_reentrant=False)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.relu(self.fc1(self.norm(x))))


@pytest.mark.parametrize(
    ("aside", "strategy", "layout", "num_ranks"),
    [
        (False, {}, "dp_shard=2,tp=2", 4),
        (True, {"activation_checkpointing": "full"}, "tp=2", 2),
        slow(False, {"max_unit_parameters": 100}, "dp_shard=2,tp=2", 4),
        slow(True, {}, "dp_shard=2,tp=2", 4),
        slow(False, {"activation_checkpointing": "selective"}, "tp=2", 2),
        slow(False, {"compile": {"backend": "aot_eager"}}, "tp=2", 2),
        slow(False, {}, "pp=2,tp=2", 4),
        slow(False, {}, "tp=4", 4),
    ],
)
def test_blocks_with_a_pair_train_as_in_one_process(aside: bool, strategy: Any, layout: str, num_ranks: int) -> None:
    """In double precision, where float32 would hide a small error behind its rounding."""
    run = Run(partial(Network, aside), samples, strategy=strategy, trainer={"precision": "64-true"})
    one = one_process(run)
    for record in on_layout(run, layout, num_ranks):
        torch.testing.assert_close(record.norms, one.norms, rtol=1e-9, atol=0)
        for name, weight in one.weights.items():
            torch.testing.assert_close(record.weights[name], weight, rtol=1e-9, atol=1e-10)


def test_modules_in_such_a_block_that_are_sharded_by_themselves_are_refused() -> None:
    run = Run(Network, samples, strategy={"shard_units": ["LayerNorm"]})
    with pytest.raises(RankError, match="which it can't where modules inside are sharded by themselves"):
        on_layout(run, "dp_shard=2,tp=2", 4)


class InPlace(Block):
    """Adds to what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.fc2(self.relu(self.fc1(self.norm(x))))
        return x


def _in_place() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), InPlace(), InPlace())
    divided, _ = divided_copy(plain)
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(divided(x), plain(x), rtol=1e-5, atol=1e-6)


def test_a_residual_in_place_is_added_once() -> None:
    run_on_ranks(2, _in_place)


def test_a_pair_beside_other_things_is_divided() -> None:
    plan = find_tensor_plan(Network())
    assert list(plan) == ["net.1.0", "net.1.1", "net.1.2"]
    assert plan["net.1.0"].columns == ("fc1",)
    assert plan["net.1.0"].parameters == {"fc1.weight": Split(0), "fc1.bias": Split(0)}
    assert plan["net.1.0"].rows == {"fc2": Split(1)}


def test_two_pairs_and_those_of_a_lightning_module_are_left_whole() -> None:
    two = Block()
    two.linear1, two.linear2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
    module = Classifier()
    module.fc1, module.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
    for network in (nn.Sequential(two), module):
        with pytest.raises(ValueError, match="tp finds nothing to divide"):
            find_tensor_plan(network)


def _normalised(block: Any, hidden: Tensor) -> Tensor:
    return F.layer_norm(hidden, (hidden.shape[-1],))


def _scaled(block: Any, hidden: Tensor) -> Tensor:
    return block.scales[1] * hidden


def _kept(block: Any, hidden: Tensor) -> Tensor:
    block.seen = hidden
    return hidden


def _folded(block: Any, hidden: Tensor) -> Tensor:
    return hidden.view(-1, 3, WIDTH).flatten(1)


def _run(between: Between) -> None:
    torch.manual_seed(0)
    network, _ = divided_copy(nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(between)))
    network(torch.randn(2, 5, WIDTH))


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (_normalised, "tp runs Block .* gives another result"),
        (_scaled, "tp divides the feed-forward layers in Block, and that sends another gradient"),
        (_kept, "tp runs Block .* its forward keeps seen"),
        (_folded, "tp runs Block .* that fails"),
    ],
)
def test_a_block_that_uses_the_hidden_features_as_a_whole_is_an_error(between: Between, message: str) -> None:
    with pytest.raises(RankError, match=message):
        run_on_ranks(2, _run, between)


def _dropped(block: type[Block]) -> dict[str, Any]:
    """What dropout keeps of the hidden features, and what is drawn after it."""
    torch.manual_seed(0)
    network, _ = divided_copy(nn.Sequential(nn.Linear(WIDTH, WIDTH), block(dropout=0.5)))
    kept: list[Tensor] = []

    def between(block: Any, hidden: Tensor) -> Tensor:
        dropped = _relu(block, hidden + 100)  # none is zero but what is dropped
        kept.append(dropped.detach() != 0)
        return dropped

    network(torch.randn(2, 5, WIDTH))  # the first run is compared
    network[1].between = between
    torch.manual_seed(1)
    network(torch.randn(2, 5, WIDTH)).sum().backward()
    return {"kept": kept, "after": torch.rand(())}


@pytest.mark.parametrize("block", [Block, Recomputing])
def test_dropout_between_is_of_each_ranks_columns_and_what_follows_is_alike(block: type[Block]) -> None:
    one, other = run_on_ranks(2, _dropped, block)
    assert torch.equal(one["after"], other["after"])
    assert not torch.equal(one["kept"][0], other["kept"][0])
    for found in (one, other):  # computed again, it is the same
        assert all(torch.equal(kept, found["kept"][0]) for kept in found["kept"])
        assert len(found["kept"]) == (2 if block is Recomputing else 1)
        assert 0.3 < float(found["kept"][0].float().mean()) < 0.7


def _hooked() -> Tensor:
    """What is drawn after a backward pass in which a gradient's hook calls a layer of the pair."""
    torch.manual_seed(0)
    network, _ = divided_copy(nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(dropout=0.5)))
    x = torch.randn(2, WIDTH)
    network(x)
    output = network(x)
    called: list[int] = []

    def hook(_: Tensor) -> None:
        called.append(1)
        with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
            network[1].fc1(x)  # whole: under a strategy its weight answers as that

    output.register_hook(hook)
    output.sum().backward()
    assert called
    return torch.rand(())


def test_a_layer_that_a_hook_calls_in_backward_is_whole() -> None:
    one, other = run_on_ranks(2, _hooked)
    assert torch.equal(one, other)


def _frozen() -> None:
    """Layers that are frozen, or tied to those of another block, and a second layer without a bias."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(), Block(), Block())
    first, second, third = plain[1:]
    first.fc1.requires_grad_(False)
    second.fc2 = nn.Linear(HIDDEN, WIDTH, bias=False)
    third.fc2.weight = first.fc2.weight
    divided, _ = divided_copy(plain)
    x = torch.randn(2, 5, WIDTH)
    for network in (plain, divided):
        network(x).square().mean().backward()
    assert Region.of(divided[1].fc1) is not None
    for (name, expected), found in zip(plain.named_parameters(), divided.parameters(), strict=True):
        assert (expected.grad is None) == (found.grad is None), name
        if expected.grad is not None:
            torch.testing.assert_close(whole(found.grad), expected.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_frozen_and_tied_layers_have_the_gradients_of_one_process() -> None:
    run_on_ranks(2, _frozen)
