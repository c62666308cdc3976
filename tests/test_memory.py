"""How much of a module a rank has on its device, while it is set up: on a GPU that is not there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn

from lightning_dist.compat.lightning import set_trainer
from lightning_dist.compat.torch import FakeTensor
from lightning_dist.dtensors import as_dtensor, replicate_like
from lightning_dist.module_layout import ModuleOptions
from lightning_dist.parallel.pipeline.stages import hide_parameters
from lightning_dist.parallel.placing import all_but_parameters_to_device, to_device
from lightning_dist.plans.tensor import TensorOptions
from lightning_dist.trainer.module_setup import ModuleSetup
from tests.support.fake_gpu import GPU, a_rank_with_a_gpu
from tests.support.models import Classifier

pytestmark = pytest.mark.sampled

VOCABULARY, WIDTH, HIDDEN, DEPTH = 32000, 4096, 11008, 32


class Layer(nn.Module):
    """Of a decoder, by its sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.gate = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.register_buffer("angles", torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Decoder(L.LightningModule):
    """7 billion parameters, built in ``__init__``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)


def _bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in module.parameters())


def _set_up(ranks: Any, module: L.LightningModule, options: ModuleOptions) -> ModuleSetup:
    set_trainer(module, SimpleNamespace(callbacks=[], datamodule=None))
    setup = ModuleSetup(ranks, options)
    setup.build(module, Precision(), training=True)
    return setup


def test_a_module_of_init_is_sharded_unit_by_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_rank_with_a_gpu(monkeypatch, "dp_shard=8") as (ranks, memory):
        module = Decoder()
        whole, unit = _bytes(module), max(_bytes(module.layers[0]), _bytes(module.embedding))
        assert memory.now == 0
        _set_up(ranks, module, ModuleOptions())
        assert {p.to_local().device for p in module.parameters()} == {GPU}  # type: ignore[attr-defined]
        assert {b.device for b in module.buffers()} == {module.device} == {GPU}
        shard = sum(p.to_local().nbytes for p in module.parameters())  # type: ignore[attr-defined]
        small = sum(b.nbytes for b in module.buffers())
        assert shard == pytest.approx(whole / 8, rel=1e-3)
        assert memory.now == shard + small
        assert memory.peak <= shard + small + unit


def test_a_module_of_init_is_divided_by_the_tensor_axis_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"*.qkv": "colwise", "*.up": "colwise", "*.gate": "colwise", "*.out": "rowwise", "*.down": "rowwise"}
    with a_rank_with_a_gpu(monkeypatch, "tp=8") as (ranks, memory):
        module = Decoder()
        whole, largest = _bytes(module), module.embedding.weight.nbytes
        _set_up(ranks, module, ModuleOptions(tensor=TensorOptions(plan)))
        part = sum(getattr(p, "to_local", p.detach)().nbytes for p in module.parameters())
        assert part < whole / 4
        assert {p.device for p in module.parameters()} == {GPU}
        small = sum(b.nbytes for b in module.buffers())
        assert memory.now == part + small
        assert memory.peak <= part + small + largest


def test_a_stage_is_sent_what_it_holds() -> None:
    """The meta device stands for a GPU, as it takes what is sent."""
    gpu, module = torch.device("meta"), Classifier()
    module.register_buffer("scale", torch.ones(1))
    all_but_parameters_to_device(module, gpu)
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    assert module.scale.device == module.device == module.auroc.device == gpu
    hide_parameters(module, [name for name, _ in module.named_parameters() if "blocks" in name], gpu)
    to_device(module, gpu)
    there = {name: type(p) for name, p in module.named_parameters() if p.device == gpu and not p.is_cpu}
    assert there == {n: FakeTensor if "blocks" in n else nn.Parameter for n, _ in module.named_parameters()}


def test_parameters_and_states_of_a_module_stay_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    with a_rank_with_a_gpu(monkeypatch, "dp_shard=8") as (ranks, memory):
        module = Decoder()
        _set_up(ranks, module, ModuleOptions(cpu_offload=True))
        small = sum(b.nbytes for b in module.buffers())
        assert {p.device.type for p in module.parameters()} == {"cpu"}
        assert memory.now == small
        weight: Any = module.head.weight
        state = as_dtensor(torch.zeros(weight.to_local().shape), weight)  # of a checkpoint
        assert state.device.type == replicate_like(torch.zeros(()), weight).device.type == "cpu"
        optimizer = torch.optim.SGD(module.parameters(), momentum=0.9)
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert {v.device.type for s in optimizer.state.values() for v in s.values()} == {"cpu"}
        assert memory.now == small
