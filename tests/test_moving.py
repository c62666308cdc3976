"""The code blocks of the guide for those who come from another strategy are run, and train as one process does."""

from __future__ import annotations

import re
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dist import HybridFabricStrategy, HybridStrategy
from lightning_dist.layout import MESH_AXES
from tests.support.models import Block, Momentum, Net, samples
from tests.support.parity import QUIET, whole_weights
from tests.support.ranks import run_on_ranks
from tests.support.source import PACKAGE

BATCH = 8
TEXT = (PACKAGE / "guides" / "moving.md").read_text()
BLOCKS = {
    section.partition("\n")[0].replace("`", ""): block
    for section in re.split(r"^## ", TEXT, flags=re.MULTILINE)
    for block in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
}


def _run(block: str, alone: bool = False) -> dict[str, Tensor]:
    """The weights that a block leaves, as a user's script would run it but for what is quiet; or those of one process,
    by Lightning alone.
    """
    one = {"devices": 1, "strategy": "auto"} if alone else {}
    built: list[Any] = []

    class Kept(Momentum):
        def __init__(self) -> None:
            torch.manual_seed(3)
            super().__init__()
            built.append(self)

    class KeptNet(Net):
        def __init__(self) -> None:
            torch.manual_seed(3)
            super().__init__()
            built.append(self)

    def quiet(**given: Any) -> L.Trainer:
        return L.Trainer(**{**QUIET, "max_epochs": 1, **given, **one})

    def quiet_fabric(**given: Any) -> L.Fabric:
        return L.Fabric(**{"accelerator": QUIET["accelerator"], **given, **one})

    class Lightning:
        Trainer, Fabric = staticmethod(quiet), staticmethod(quiet_fabric)

    data_ranks = 1 if alone or "tp=2" in block else 2
    names: dict[str, Any] = {
        "L": Lightning,
        "torch": torch,
        "F": F,
        "HybridStrategy": HybridStrategy,
        "HybridFabricStrategy": HybridFabricStrategy,
        "Module": Kept,
        "Net": KeptNet,
        "Block": Block,
        "loader": DataLoader(samples(), batch_size=BATCH // data_ranks),
    }
    exec(block, names)
    return {name.removeprefix("net."): weight for name, weight in whole_weights(built[0]).items()}


@pytest.mark.parametrize("source", BLOCKS)
def test_each_block_trains_as_one_process(source: str) -> None:
    one = _run(BLOCKS[source], alone=True)
    for weights in run_on_ranks(2, _run, BLOCKS[source]):
        assert weights.keys() == one.keys()
        for name, weight in one.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5)


def test_there_is_a_block_for_each_strategy() -> None:
    assert list(BLOCKS) == [
        "Lightning's ddp",
        "Lightning's fsdp",
        "ModelParallelStrategy",
        "DeepSpeed",
        "Accelerate, or a loop of your own",
    ]


def _meshes() -> list[Any]:
    seen: list[Any] = []

    class Looking(Momentum):
        def configure_model(self) -> None:
            mesh: Any = self.device_mesh
            seen.append(dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True)))

        def on_train_start(self) -> None:
            mesh: Any = self.device_mesh
            seen.append(mesh["dp_shard"].size())

    trainer = L.Trainer(**QUIET, devices=2, strategy=HybridStrategy("dp_shard=2"), max_steps=1)
    trainer.fit(Looking(), DataLoader(samples(), batch_size=BATCH))
    return seen


def test_a_module_finds_the_mesh_of_the_layout() -> None:
    degrees = dict.fromkeys(MESH_AXES, 1) | {"dp_shard": 2}
    assert run_on_ranks(2, _meshes) == [[degrees, 2]] * 2
