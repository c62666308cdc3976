"""What is drawn for a rank's columns is the rank's own, however the module draws it, and all else as in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.ranks import run_on_ranks
from tests.tensor.networks import WIDTH, Conditioned, Network, divided_copy, inputs

Ways = Callable[[Any, Tensor], Tensor]
seen: list[Tensor] = []
"""What was drawn for hidden features that are all 1."""


def literal(module: Any, hidden: Tensor) -> Tensor:
    return F.dropout(hidden, 0.5)


def by_another_name(module: Any, hidden: Tensor) -> Tensor:
    return F.dropout(hidden, module.rate, module.training)


def noise(module: Any, hidden: Tensor) -> Tensor:
    return hidden + torch.randn_like(hidden)


def mask(module: Any, hidden: Tensor) -> Tensor:
    return hidden * torch.empty_like(hidden).bernoulli_(0.5)


class Mlp(nn.Module):
    """A feed-forward module of its own."""

    def __init__(self, way: Ways) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.way, self.rate = way, 0.5

    def relu(self, hidden: Tensor) -> Tensor:
        """By its name of one element."""
        drawn = self.way(self, torch.ones_like(hidden))
        seen.append(drawn.detach())
        return hidden.relu() * drawn

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.relu(self.fc1(x)))


class Pair(Mlp):
    """The same layers beside a norm."""

    def __init__(self, way: Ways) -> None:
        super().__init__(way)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.relu(self.fc1(self.norm(x))))


def _drawn(kind: type[Mlp], way: Ways, training: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    network, _ = divided_copy(nn.Sequential(nn.Linear(WIDTH, WIDTH), kind(way)).train(training))
    assert isinstance(network[1].fc1.weight, torch.distributed.tensor.DTensor)
    network(torch.randn(2, 5, WIDTH))  # the first run is compared
    torch.manual_seed(1)
    network(torch.randn(2, 5, WIDTH))
    return {"drawn": seen.pop(), "after": torch.rand(())}


@pytest.mark.parametrize("kind", [Mlp, Pair])
@pytest.mark.parametrize(
    ("way", "training"), [(literal, True), (literal, False), (by_another_name, True), (noise, True), (mask, True)]
)
def test_columns_have_random_numbers_of_their_own(kind: type[Mlp], way: Ways, training: bool) -> None:
    one, other = run_on_ranks(2, _drawn, kind, way, training)
    assert one["drawn"].shape == (2, 5, 16)
    assert not torch.equal(one["drawn"], other["drawn"])
    assert torch.equal(one["after"], other["after"])


def dropout_of_half(hidden: Tensor) -> Tensor:
    return F.dropout(hidden, 0.5)


class Plain(nn.Module):
    """Dropout as a layer, or in a function that a method calls."""

    def __init__(self, layer: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH, bias=False)
        self.drop = nn.Dropout(0.5) if layer else None

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropped(self.fc1(x).relu()))

    def dropped(self, hidden: Tensor) -> Tensor:
        return dropout_of_half(hidden) if self.drop is None else self.drop(hidden)


def _compiled(layer: bool) -> tuple[Tensor, Tensor]:
    """What is kept of the first rank's columns, and of the other's, all of which are 1 before."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), Plain(layer))
    with torch.no_grad():
        plain[1].fc1.weight.zero_()
        plain[1].fc1.bias.fill_(1)
        plain[1].fc2.weight.copy_(torch.cat([torch.eye(WIDTH), 10 * torch.eye(WIDTH)], 1))
    network, _ = divided_copy(plain)
    output = torch.compile(network, backend="aot_eager")(torch.ones(64, WIDTH))
    return (output % 20 > 1).detach(), (output > 19).detach()


@pytest.mark.parametrize("layer", [True, False])
def test_compiled_columns_have_random_numbers_of_their_own(layer: bool) -> None:
    for one, other in run_on_ranks(2, _compiled, layer):
        assert 0.4 < float(one.float().mean()) < 0.6
        assert 0.2 < float((one == other).float().mean()) < 0.8


def _off_and_on(kind: type[Mlp]) -> dict[str, Any]:
    torch.manual_seed(0)
    network, _ = divided_copy(nn.Sequential(nn.Linear(WIDTH, WIDTH), kind(by_another_name)))
    x = torch.randn(2, 5, WIDTH)
    network[1].rate = 0.0
    after = []
    for training in (True, False):
        torch.manual_seed(1)
        network.train(training)(x)
        network(x)
        after.append(torch.rand(()))
    network[1].rate = 0.5
    network.train()(x)
    return {"after": after, "drawn": seen.pop()}


@pytest.mark.parametrize("kind", [Mlp, Pair])
def test_where_nothing_is_drawn_the_stream_stays_and_a_rate_may_begin_later(kind: type[Mlp]) -> None:
    one, other = run_on_ranks(2, _off_and_on, kind)
    torch.manual_seed(1)
    expected = torch.rand(())
    assert all(torch.equal(after, expected) for after in (*one["after"], *other["after"]))
    assert not torch.equal(one["drawn"], other["drawn"])


class OnResidual(Pair):
    """Draws beside the pair, and nothing between its layers."""

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.fc2(self.relu(self.fc1(self.norm(x)))), 0.5)


def _on_residual() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), OnResidual(lambda _, hidden: hidden), nn.Dropout(0.5))
    divided, _ = divided_copy(plain)
    x = torch.randn(2, 5, WIDTH)
    for _ in range(2):
        outputs = []
        for network in (plain, divided):
            torch.manual_seed(1)
            outputs.append(network(x))
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


def test_what_is_drawn_beside_a_pair_is_that_of_one_process() -> None:
    run_on_ranks(2, _on_residual)


class Written(Conditioned):
    """A block whose dropout has its probability in the call."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        drawn = F.dropout(torch.ones_like(x), 0.5)
        seen.append(drawn)
        return super().forward(x, condition) * drawn


def _of_positions() -> Tensor:
    torch.manual_seed(0)
    network = Network()
    network.blocks = nn.ModuleList([Written(), Written()])
    divided, _ = divided_copy(network.train(), sequence_parallel=True)
    divided(*inputs())
    divided(*inputs())
    return seen.pop()[:, :3]  # the last of 7 positions is alone


def test_positions_have_dropout_of_their_own() -> None:
    one, other = run_on_ranks(2, _of_positions)
    assert not torch.equal(one, other)
