"""What is drawn for a rank's columns is the rank's own, however the module draws it, and all else as in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.parity import slow
from tests.support.ranks import run_on_ranks
from tests.tensor.networks import WIDTH, Conditioned, Network, divided_copy
from tests.tensor.networks import inputs as network_inputs

Ways = Callable[[Any, Tensor], Tensor]
seen: list[Tensor] = []
"""What was drawn for hidden features that are all 1."""


def nothing(module: Any, hidden: Tensor) -> Tensor:
    return hidden


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


@pytest.mark.parametrize("layer", [slow(True), False])
def test_compiled_columns_have_random_numbers_of_their_own(layer: bool) -> None:
    for one, other in run_on_ranks(2, _compiled, layer):
        assert 0.4 < float(one.float().mean()) < 0.6
        assert 0.2 < float((one == other).float().mean()) < 0.8


class Module(nn.Module):
    """A feed-forward module that draws in some way; see the names of its methods."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.way = way
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.way)(x)

    def path(self, x: Tensor) -> Tensor:
        """Stochastic depth: a number for each sample."""
        kept = (torch.rand(len(x), 1, 1) > 0.5).float()
        return self.fc2(self.fc1(x).relu()) * kept

    def path_and_columns(self, x: Tensor) -> Tensor:
        hidden = F.dropout(self.fc1(x).relu(), 0.5)
        kept = (torch.rand(len(x), 1, 1) > 0.5).float()
        return self.fc2(hidden) * kept

    def path_between(self, x: Tensor) -> Tensor:
        """Before the columns, and after the first divided layer."""
        hidden = self.fc1(x)
        kept = (torch.rand(len(x), 1, 1) > 0.5).float()
        return self.fc2(F.dropout(hidden.relu(), 0.5)) * kept

    def after_the_last(self, x: Tensor) -> Tensor:
        """Numbers for its columns, of which nothing more is made."""
        hidden = self.fc1(x).relu()
        return self.fc2(hidden) + 0 * torch.rand_like(hidden).mean()

    def from_its_own(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x).relu()
        return self.fc2(hidden + torch.randn(hidden.shape, generator=self.generator))


class ByBuffer(Mlp):
    """Its rate is in a buffer, of which nothing tells that it changes."""

    def __init__(self) -> None:
        super().__init__(by_a_buffer)
        self.register_buffer("rate_now", torch.zeros(()))


def by_a_buffer(module: Any, hidden: Tensor) -> Tensor:
    return F.dropout(hidden, float(module.rate_now))


class InChunks(Mlp):
    """Calls its layers more than once."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.fc2(self.relu(self.fc1(part))) for part in x.chunk(2, 1)], 1)


def _of_chunks() -> list[Tensor]:
    torch.manual_seed(0)
    network, _ = divided_copy(nn.Sequential(nn.Linear(WIDTH, WIDTH), InChunks(literal)))
    x = torch.randn(2, 6, WIDTH)
    network(x)
    network(x)
    return [*seen[-2:], torch.rand(())]


def test_layers_that_are_called_twice_draw_for_their_columns_twice() -> None:
    one, other = run_on_ranks(2, _of_chunks)
    assert not any(torch.equal(*pair) for pair in zip(one[:2], other[:2], strict=True))
    assert not torch.equal(*one[:2])
    assert torch.equal(one[2], other[2])


class InputDropped(Mlp):
    """Drops what it is given, too: the same of which on all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        kept = F.dropout(torch.ones_like(x), 0.5)
        inputs.append(kept)
        return self.fc2(self.relu(self.fc1(x * kept)))


inputs: list[Tensor] = []


def _of_input() -> list[Tensor]:
    torch.manual_seed(0)
    network, _ = divided_copy(nn.Sequential(nn.Linear(WIDTH, WIDTH), InputDropped(literal), nn.Dropout(0.5)))
    x = torch.randn(2, 5, WIDTH)
    for _ in range(2):
        torch.manual_seed(1)
        network(x)
    return [seen.pop(), inputs.pop(), torch.rand(())]


def test_what_is_drawn_before_the_first_divided_layer_is_alike() -> None:
    one, other = run_on_ranks(2, _of_input)
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    torch.manual_seed(1)
    assert torch.equal(one[1], F.dropout(torch.ones(2, 5, WIDTH), 0.5))  # as one process draws it
    assert torch.equal(one[2], other[2])


class Mixing(Pair):
    """Between the layers of its pair it drops what all ranks have."""

    def __init__(self) -> None:
        super().__init__(nothing)
        self.mix, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(self.norm(x))
        beside = self.drop(self.mix(x))
        return x + beside + self.fc2(self.relu(hidden))


def _beside_one_process(plain: nn.Module) -> None:
    """The divided module gives what the whole one does, from the same stream, which it leaves where that does."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), plain)
    divided, _ = divided_copy(plain)
    x = torch.randn(2, 6, WIDTH)
    for _ in range(2):
        outputs = []
        for network in (plain, divided):
            torch.manual_seed(1)
            outputs += [network(x), torch.rand(3)]
        torch.testing.assert_close(outputs[:2], outputs[2:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", [Module("path"), Mixing()], ids=["part", "pair"])
def test_what_is_drawn_for_all_ranks_is_that_of_one_process(module: nn.Module) -> None:
    run_on_ranks(2, _beside_one_process, module)


def _told(way: str) -> str:
    network, _ = divided_copy(nn.Sequential(nn.Linear(WIDTH, WIDTH), Module(way)))
    with pytest.raises(ValueError, match="it draws random numbers") as raised:
        network(torch.randn(2, 6, WIDTH))
    return str(raised.value)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("path_and_columns", "for all of them, of which each rank would have others"),
        ("path_between", "for all of them, of which each rank would have others"),
        ("after_the_last", "after its last divided layer, or from its own generator"),
        ("from_its_own", "after its last divided layer, or from its own generator"),
    ],
)
def test_what_no_stream_would_do_for_is_refused_on_all_ranks(way: str, message: str) -> None:
    for told in run_on_ranks(2, _told, way):
        assert message in told


def _rate_of_a_buffer() -> Tensor:
    torch.manual_seed(0)
    network, _ = divided_copy(nn.Sequential(nn.Linear(WIDTH, WIDTH), ByBuffer()))
    x = torch.randn(2, 6, WIDTH)
    network(x)
    network[1].rate_now.fill_(0.5)
    network(x)
    return seen.pop()


def test_a_rate_in_a_buffer_may_begin_later() -> None:
    one, other = run_on_ranks(2, _rate_of_a_buffer)
    assert not torch.equal(one, other)


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
    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), OnResidual(nothing), nn.Dropout(0.5))
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


class Noisy(Conditioned):
    """Adds noise to its positions, which nothing tells from what is drawn for all."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x, condition) + torch.randn_like(x)


def _noisy() -> str:
    network = Network()
    network.blocks = nn.ModuleList([Noisy(), Noisy()])
    divided, _ = divided_copy(network.train(), sequence_parallel=True)
    with pytest.raises(ValueError, match="it draws random numbers") as raised:
        divided(*network_inputs())
    return str(raised.value)


def test_noise_on_a_part_of_the_positions_is_refused() -> None:
    assert all("which all ranks would have alike" in told for told in run_on_ranks(2, _noisy))


def _of_positions() -> Tensor:
    torch.manual_seed(0)
    network = Network()
    network.blocks = nn.ModuleList([Written(), Written()])
    divided, _ = divided_copy(network.train(), sequence_parallel=True)
    divided(*network_inputs())
    divided(*network_inputs())
    return seen.pop()[:, :3]  # the last of 7 positions is alone


def test_positions_have_dropout_of_their_own() -> None:
    one, other = run_on_ranks(2, _of_positions)
    assert not torch.equal(one, other)
