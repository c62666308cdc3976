"""What torch.compile sees of parameters that tp divides, and layers that a step calls one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dist import HybridStrategy
from tests.support.parity import QUIET
from tests.support.ranks import RankError, run_on_ranks

WIDTH = 4


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class Plain(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net: nn.Module = Pair()
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.mse_loss(self(batch[0]), batch[0])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.5)


class LayerByLayer(Plain):
    """The forward of the pair never runs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net.down(F.relu(self.net.up(x)))  # type: ignore[operator, union-attr]


class InAList(Plain):
    """A container has no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict(dict(self.net.named_children()))

    def forward(self, x: Tensor) -> Tensor:
        return self.net["down"](F.relu(self.net["up"](x)))  # type: ignore[index]


class CompiledPair(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net.compile(backend="aot_eager")


class CompiledLayer(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net.up.compile(backend="aot_eager")  # type: ignore[operator, union-attr]


class CompiledObject(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="aot_eager")  # type: ignore[assignment]


class CompiledFunction(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.function = torch.compile(lambda x: self.net(x), backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class CompiledPenalty(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.compile(lambda: sum(p.square().sum() for p in self.net.parameters()), backend="aot_eager")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.norm()


def _losses(kind: Callable[[], Plain], layout: str | None) -> list[float]:
    module = kind()
    data = TensorDataset(torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(1)))
    strategy: Any = "auto"
    if layout is not None:
        strategy = HybridStrategy(layout, tensor_plan={"*net*.up": "colwise", "*net*.down": "rowwise"})
    trainer = L.Trainer(**QUIET, devices=1 if layout is None else 2, max_epochs=2, strategy=strategy)
    trainer.fit(module, DataLoader(data, batch_size=8))
    return module.losses


@pytest.mark.parametrize("kind", [LayerByLayer, InAList, CompiledPair, CompiledLayer, CompiledObject])
def test_divided_layers_equal_one_process(kind: type[Plain]) -> None:
    expected = _losses(Plain, None)
    for losses in run_on_ranks(2, _losses, kind, "tp=2"):
        assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [CompiledFunction, CompiledPenalty])
def test_compiled_functions_that_reach_divided_parameters_are_refused(kind: type[Plain]) -> None:
    with pytest.raises(RankError, match=r"torch\.compile traces a function that reads a parameter .* each rank holds"):
        run_on_ranks(2, _losses, kind, "tp=2")
