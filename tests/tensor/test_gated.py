"""Gated feed-forward modules under any names are divided by what their forward does; what only looks alike is not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from lightning_dist.plans.tensor import Split, find_tensor_plan
from tests.support.models import CLASSES, WIDTH, samples
from tests.support.parity import QUIET, Run, assert_parity, slow
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled


class Gated(nn.Module):
    """``c(f(a(x)) * b(x))``, and what is said of it."""

    def __init__(self, kind: str = "SwiGLU", width: int = WIDTH, hidden: int = 2 * WIDTH, bias: bool = True) -> None:
        super().__init__()
        self.kind = kind
        self.mix, self.left, self.right = (nn.Linear(*s, bias=bias) for s in ((hidden, width), *2 * [(width, hidden)]))
        self.activation = {"GEGLU": nn.GELU(approximate="tanh"), "ReGLU": nn.ReLU()}.get(kind, nn.SiLU())
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.left(x), self.right(x)
        if self.kind == "functions":
            return F.dropout(self.mix(torch.sigmoid(gate).mul(value)), 0.0, self.training)
        if self.kind == "other way round":
            return self.mix(value * F.silu(gate))
        if self.kind == "dropout":
            return self.drop(self.mix(self.drop(self.activation(gate)) * value))
        return self.mix(self.activation(gate) * value)


class Nested(nn.Module):
    """Its gate is a Sequential, and one width is both the hidden one and its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gate(x) * self.value(x))


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.feed = Nested() if kind == "nested" else Gated(kind)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.feed(self.norm(x))


class Classifies(L.LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net = nn.Sequential(Block(kind), Block(kind), nn.Linear(WIDTH, CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


KINDS = ["SwiGLU", "GEGLU", "ReGLU", "functions", "other way round", "nested"]


@pytest.mark.parametrize("kind", [*KINDS, "dropout"])
def test_gated_modules_are_divided_by_columns_and_rows(kind: str) -> None:
    plan = find_tensor_plan(Classifies(kind))
    assert list(plan) == ["net.0.feed", "net.1.feed"]
    columns, row = (("gate.0", "value"), "out") if kind == "nested" else (("left", "right"), "mix")
    part = plan["net.0.feed"]
    assert part.rows == {row: Split(1)}
    assert part.parameters == {f"{name}.{leaf}": Split(0) for name in columns for leaf in ("weight", "bias")}


@pytest.mark.parametrize(
    ("kind", "layout", "num_ranks"),
    [(kind, "tp=2", 2) for kind in KINDS] + [slow(kind, "dp_shard=2,tp=2", 4) for kind in KINDS],
)
def test_gated_modules_train_as_in_one_process(kind: str, layout: str, num_ranks: int) -> None:
    assert_parity(Run(partial(Classifies, kind), samples, samples), layout, num_ranks)


def test_explain_shows_the_sharding_plan(capsys: pytest.CaptureFixture[str]) -> None:
    HybridStrategy("tp=2").explain(Classifies("SwiGLU"), 2).print()
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if "net.*.feed " in line]
    assert "by columns: left" in line


def _evaluated_after_the_fit(kind: str) -> list[float]:
    L.seed_everything(1, verbose=False)
    module = Classifies(kind)
    values = []
    for _ in range(2):
        trainer = L.Trainer(**QUIET, devices=2, strategy=HybridStrategy("tp=2"), max_epochs=1)
        trainer.fit(module, DataLoader(samples(), batch_size=8))
        values += [trainer.validate(module, DataLoader(samples(), batch_size=8), verbose=False)[0]["loss"]]
    return values


def test_a_divided_module_is_recognised_again() -> None:
    first, second = run_on_ranks(2, _evaluated_after_the_fit, "SwiGLU")
    assert first == second
    assert first[1] < first[0]


def _with(forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    return type("Looks", (Gated,), {"forward": forward})()


ALIKE = {
    "a softmax over the hidden width": lambda m, x: m.mix(F.softmax(m.left(x), -1) * m.right(x)),
    "a sum in place of the product": lambda m, x: m.mix(F.silu(m.left(x)) + m.right(x)),
    "a norm over the hidden width": lambda m, x: m.mix(F.layer_norm(m.left(x) * m.right(x), (2 * WIDTH,))),
    "a residual": lambda m, x: x + m.mix(F.silu(m.left(x)) * m.right(x)),
    "a matrix product": lambda m, x: m.mix(m.left(x) @ m.right(x).transpose(-1, -2) @ m.right(x)),
    "another input": lambda m, x: m.mix(F.silu(m.left(x)) * m.right(2 * x)),
    "one after the other": lambda m, x: m.mix(m.left(m.mix(m.right(x)))),
    "one that is not used": lambda m, x: m.mix(F.silu(m.left(x))),
    "one that is used twice": lambda m, x: m.mix(m.left(x) * m.left(x) * m.right(x)),
    "what is returned beside": lambda m, x: (m.mix(F.silu(m.left(x)) * m.right(x)), x),
    "the hidden values": lambda m, x: F.silu(m.left(x)) * m.right(x) * m.mix(m.left(x) * m.right(x)).sum(),
    "a branch on values": lambda m, x: m.mix(F.silu(m.left(x)) * m.right(x)) if x.sum() > 0 else x,
    "a chunk of it": lambda m, x: m.mix(torch.cat([m.left(x).chunk(2, -1)[0], m.right(x).chunk(2, -1)[1]], -1)),
    "a mean over it": lambda m, x: m.mix(m.left(x) * m.right(x).mean(-1, keepdim=True)),
}


@pytest.mark.parametrize("forward", ALIKE.values(), ids=ALIKE)
def test_what_only_looks_alike_is_left_whole(forward: Any) -> None:
    with pytest.raises(ValueError, match="tp finds nothing to divide"):
        find_tensor_plan(nn.Sequential(_with(forward)))


def test_layers_that_share_weights_or_have_company_are_left_whole() -> None:
    tied = Gated()
    tied.left.weight = tied.right.weight
    scaled = Gated()
    scaled.scale = nn.Parameter(torch.ones(2 * WIDTH))
    for module in (tied, scaled):
        with pytest.raises(ValueError, match="tp finds nothing to divide"):
            find_tensor_plan(nn.Sequential(module))
