"""Which blocks hand what one layer gives to the other, element by element, by what their source says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from lightning_dist.plans.tensor import find_tensor_plan
from lightning_dist.plans.tensor.chain import is_chain, passes_on

WIDTH, HIDDEN = 8, 24


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), nn.LayerNorm(HIDDEN)
        self.fc1, self.fc2, self.other = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH), nn.Linear(HIDDEN, 4)
        self.dropout, self.soft, self.one = nn.Dropout(0.1), nn.Softmax(-1), nn.PReLU()
        self.act, self.function, self.scale = ACT2FN["gelu"], F.silu, nn.Parameter(torch.ones(HIDDEN))


class InOneLine(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.relu(self.fc1(self.norm(x))))


class LineByLine(Block):
    def forward(self, x: Tensor) -> Tensor:
        rest = x
        x = self.fc1(self.norm(x))
        x = self.act(x)
        x = nn.functional.dropout(x, p=0.1, training=self.training)
        x = self.fc2(x)
        x = self.dropout(x)
        if x.dtype == torch.float16 and not torch.isfinite(x).all():
            x = torch.clamp(x, min=-1e4, max=1e4)
        return rest + F.layer_norm(x, x.shape[-1:])


class OfAMethod(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.feed_forward(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        hidden = 0.5 * self.function(self.fc1(x)).to(x.dtype)
        if self.training:
            hidden = self.dropout(hidden)
        return self.fc2(hidden.square())


class Inherited(OfAMethod):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Gated(Block):
    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class ANorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.inner(F.relu(self.fc1(x))))


class AFunction(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        hidden = F.layer_norm(hidden, (HIDDEN,))
        return self.fc2(hidden)


class ASoftmax(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.soft(self.fc1(x)))


class AMethod(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).softmax(-1))


class OneWeight(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.one(self.fc1(x)))


class AScale(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.scale * self.fc1(x))


class SideBySide(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x)[..., :WIDTH] * self.fc2(x.repeat(1, 3))


class Kept(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.fc1(x)
        return self.fc2(self.seen)


class Returned(Block):
    def forward(self, x: Tensor) -> Any:
        hidden = F.relu(self.fc1(x))
        return self.fc2(hidden), hidden


class ReadTwice(Block):
    def forward(self, x: Tensor) -> Any:
        hidden = self.fc1(x)
        return self.fc2(hidden), self.other(hidden)


class CalledTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.fc2(self.fc1(x))))


class AddedTo(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        hidden += x.repeat(1, 3)
        return self.fc2(hidden)


class ItsShape(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(hidden) / hidden.shape[-1]


class Later(Block):
    def forward(self, x: Tensor) -> Tensor:
        def feed_forward(x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x))

        return feed_forward(x)


class WithoutTheFirst(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.fc1(x))
        hidden = torch.zeros_like(x).repeat(1, 3)
        return self.fc2(hidden)


class ByAnotherName(Block):
    def forward(self, x: Tensor) -> Tensor:
        first = self.fc1
        return self.fc2(first(x))


CHAINS = [InOneLine, LineByLine, OfAMethod, Inherited, Gated]
OTHERS = [
    *(ANorm, AFunction, ASoftmax, AMethod, OneWeight, AScale, SideBySide, Kept, Returned, ReadTwice, CalledTwice),
    *(AddedTo, ItsShape, Later, WithoutTheFirst, ByAnotherName),
]


@pytest.mark.parametrize("kind", CHAINS)
def test_a_chain_is_seen(kind: type[Block]) -> None:
    assert is_chain(kind(), ("fc1",), "fc2")


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_used_otherwise_is_no_chain_and_stays_whole(kind: type[Block]) -> None:
    assert not is_chain(kind(), ("fc1",), "fc2")
    with pytest.raises(ValueError, match="tp finds nothing to divide"):
        find_tensor_plan(nn.Sequential(kind()))


def test_what_has_no_source_is_no_chain() -> None:
    found: dict[str, Any] = {"Block": Block, "F": F}
    exec("class Written(Block):\n    def forward(self, x):\n        return self.fc2(F.relu(self.fc1(x)))", found)
    assert not is_chain(found["Written"](), ("fc1",), "fc2")


class Intermediate(nn.Module):
    """As of BERT; what ``activate`` does lies between its layer and that of the output."""

    def __init__(self, outputs: int = HIDDEN) -> None:
        super().__init__()
        self.dense, self.drop = nn.Linear(WIDTH, outputs), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense(x)
        return F.gelu(x)


class GatedIntermediate(Intermediate):
    def __init__(self) -> None:
        super().__init__(2 * HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.dense(x).chunk(2, -1)
        return F.gelu(gate) * value


class Normalised(Intermediate):
    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x).softmax(-1)


class Dropping(Intermediate):
    """In no part that would draw for its columns."""

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.dense(x))


class AtTimes(Intermediate):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dense(x)
        return F.gelu(hidden) if x.ndim else x


class Output(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(HIDDEN, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        hidden = self.dense(hidden)
        return self.norm(hidden + x)


class Looking(Output):
    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        return super().forward(hidden / hidden.norm(), x)


class DroppedFirst(Output):
    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        return super().forward(F.dropout(hidden, 0.1), x)


class BertLayer(nn.Module):
    def __init__(self, intermediate: nn.Module, output: nn.Module) -> None:
        super().__init__()
        self.intermediate, self.output = intermediate, output

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.intermediate(x), x)


class BetweenThem(BertLayer):
    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.normalize(self.intermediate(x), dim=-1), x)


def test_layers_in_modules_beside_each_other_are_divided() -> None:
    plan = find_tensor_plan(nn.Sequential(BertLayer(Intermediate(), Output())))
    assert list(plan) == ["0.intermediate.dense", "0.output.dense"]


@pytest.mark.parametrize(
    ("block", "intermediate", "output"),
    [
        *((BertLayer, kind, Output) for kind in (GatedIntermediate, Normalised, Dropping, AtTimes)),
        *((BertLayer, Intermediate, kind) for kind in (Looking, DroppedFirst)),
        (BetweenThem, Intermediate, Output),
    ],
)
def test_such_layers_are_whole_where_something_else_lies_between(
    block: type[BertLayer], intermediate: type[nn.Module], output: type[nn.Module]
) -> None:
    with pytest.raises(ValueError, match="tp finds nothing to divide"):
        find_tensor_plan(nn.Sequential(block(intermediate(), output())))


class SelfAttention(nn.Module):
    """As of BERT; whole heads."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.num_attention_heads, self.attention_head_size = 2, WIDTH // 2

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (layer(x).unflatten(-1, (-1, WIDTH // 2)) for layer in (self.query, self.key, self.value))
        weights = torch.einsum("bqhf,bkhf->bhqk", q, k).softmax(-1)
        return torch.einsum("bhqk,bkhf->bqhf", weights, v).flatten(-2), weights


class SelfOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        return self.norm(self.dense(hidden) + x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self, self.output = SelfAttention(), SelfOutput()
        self.norm, self.gate = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        given = self.self(x)
        mixed = self.output(given[0], x)
        return (mixed, *given[1:])


class Unpacked(Attention):
    def forward(self, x: Tensor) -> Any:
        mixed, weights = self.self(self.norm(x))
        mixed = self.output(mixed.to(x.dtype), x)
        return mixed, weights


class InOne(Attention):
    def forward(self, x: Tensor) -> Any:
        return self.output(F.relu(self.self(x)[0]), x)


class GatedByTheInput(Attention):
    def forward(self, x: Tensor) -> Any:
        mixed, weights = self.self(x)
        return self.output(mixed * torch.sigmoid(x), x), weights


class NormalisedBetween(Attention):
    def forward(self, x: Tensor) -> Any:
        given = self.self(x)
        return self.output(F.normalize(given[0], dim=-1), x)


class WithWeightsBetween(Attention):
    def forward(self, x: Tensor) -> Any:
        return self.output(self.gate(self.self(x)[0]), x)


class TheOther(Attention):
    def forward(self, x: Tensor) -> Any:
        given = self.self(x)
        return self.output(given[1], x)


class TheLast(Attention):
    def forward(self, x: Tensor) -> Any:
        given = self.self(x)
        return self.output(given[-1], x)


class ReturnedToo(Attention):
    def forward(self, x: Tensor) -> Any:
        given = self.self(x)
        return self.output(given[0], x), given[0]


class NotAlways(Attention):
    def forward(self, x: Tensor) -> Any:
        mixed = self.self(x)[0]
        if x.ndim == 2:
            mixed = x
        return self.output(mixed, x)


class AsResidual(Attention):
    def forward(self, x: Tensor) -> Any:
        mixed, _ = self.self(x)
        return self.output(mixed, x + mixed)


PASSING = [Attention, Unpacked, InOne]
STOPPING = [
    *(GatedByTheInput, NormalisedBetween, WithWeightsBetween, TheOther, TheLast, ReturnedToo, NotAlways, AsResidual),
]


@pytest.mark.parametrize("kind", PASSING)
def test_attention_that_lies_beside_its_output_is_divided(kind: type[Attention]) -> None:
    assert passes_on(kind(), "self", "output")
    assert list(find_tensor_plan(nn.Sequential(kind()))) == ["0.self", "0.output.dense"]


@pytest.mark.parametrize("kind", STOPPING)
def test_such_attention_is_whole_where_something_else_is_done_with_what_it_gives(kind: type[Attention]) -> None:
    assert not passes_on(kind(), "self", "output")
    with pytest.raises(ValueError, match="tp finds nothing to divide"):
        find_tensor_plan(nn.Sequential(kind()))
