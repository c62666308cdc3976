"""What torch.compile sees of parameters that tp divides, and layers that a step calls one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader, TensorDataset

from lightning_dist import HybridStrategy
from lightning_dist.divided.compiled import show_parts_to_compiled
from lightning_dist.parallel.fsdp import FSDPRunner
from lightning_dist.parallel.parallelize import _compile
from lightning_dist.parallel.shard_options import ShardOptions
from lightning_dist.patches import Patches
from tests.support.parity import QUIET, Run, assert_parity
from tests.support.ranks import RankError, run_on_ranks

pytestmark = pytest.mark.sampled

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


class Blocks(Plain):
    """More blocks than torch compiles one function for."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.net = nn.ModuleList(block() for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.net:  # type: ignore[union-attr]
            x = block(x)
        return x


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, 0.0, batch_first=True)


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())


@pytest.mark.parametrize("block", [Pair, encoder_layer, sequential])
def test_one_graph_is_compiled_for_all_sharded_blocks(block: Callable[[], nn.Module]) -> None:
    """Of users' classes and of torch's own; a second for inputs that require a gradient."""
    torch._dynamo.reset()
    counter, patches = CompileCounter(), Patches()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
        module = Blocks(block)
        units = {f"net.{number}": child for number, child in enumerate(module.net.children())}
        _compile(module, units, {"backend": counter, "fullgraph": True}, patches)
        runner = FSDPRunner(module, mesh, units, MixedPrecisionPolicy(), ShardOptions(), mesh.get_group(), patches)
        show_parts_to_compiled(module, patches)
        for _ in range(2):
            runner.before_backward(runner.run("training_step", (torch.randn(2, 3, WIDTH),), 0)).backward()
    finally:
        dist.destroy_process_group()
    assert counter.frame_count == 2


def encoder() -> L.LightningModule:
    return Blocks(encoder_layer)


def points() -> TensorDataset:
    return TensorDataset(torch.randn(32, 3, WIDTH, generator=torch.Generator().manual_seed(2)))


def test_compiled_layers_of_torch_train_as_in_one_process() -> None:
    compiled = {"backend": "eager", "fullgraph": True}
    assert_parity(Run(encoder, points, strategy={"compile": compiled}), "dp_shard=2", 2)
