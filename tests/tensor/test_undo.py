"""After the tensor axis is taken off a module it is as one that was never on it."""

from __future__ import annotations

import copy
import io
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_dist.parallel.replaced import give_back, whole_tensors
from lightning_dist.parallel.tensor.split import TensorAxis, split
from lightning_dist.patches import Patches
from lightning_dist.plans import find_blocks
from lightning_dist.plans.tensor import TensorOptions, partial_parameters
from tests.support.ranks import run_on_ranks
from tests.tensor.families import FAMILIES, LAYER

pytestmark = pytest.mark.sampled

CASES = [("gpt2", False), ("t5", False), ("torchvision swin", False), ("torch transformer", False), ("llama", True)]
OTHERS = [(name, False) for name in FAMILIES if (name, False) not in CASES]
HOOKS = ("forward_pre_hooks", "forward_hooks", "backward_hooks", "state_dict_hooks", "state_dict_pre_hooks")


@pytest.mark.parametrize(
    ("name", "sequence_parallel"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]
)
def test_a_module_off_the_tensor_axis_is_as_it_was(name: str, sequence_parallel: bool) -> None:
    run_on_ranks(2, _undone, name, sequence_parallel, timeout=60)


def _undone(name: str, sequence_parallel: bool) -> None:
    family = FAMILIES[name]
    torch.manual_seed(0)
    plain = family.network()
    module = copy.deepcopy(plain)
    blocks = find_blocks(module)
    sharding_plan = TensorOptions(None, sequence_parallel, loss_parallel=True).sharding_plan(module, 2, blocks)
    patches = _on_the_axis(module, sharding_plan)
    family.loss(module).backward()
    callback = SimpleNamespace(copied=copy.deepcopy(module))
    _taken_off(module, patches, callback)

    _assert_same_attributes(module, plain)
    copies = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), _saved_and_loaded(module))
    for again in (module, *copies, callback.copied):
        _assert_same_training(family, again, copy.deepcopy(plain))


def _on_the_axis(module: nn.Module, sharding_plan: Any) -> Patches:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    patches = Patches()
    split(module, sharding_plan, mesh, patches=patches)
    TensorAxis(module, partial_parameters(module, sharding_plan), mesh)
    assert any(isinstance(parameter, DTensor) for parameter in module.parameters())
    return patches


def _taken_off(module: nn.Module, patches: Patches, *owners: Any) -> None:
    whole = whole_tensors(module)
    patches.undo()
    give_back(module, whole, {}, owners)


def _saved_and_loaded(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _assert_same_attributes(module: nn.Module, plain: nn.Module) -> None:
    for (name, child), reference in zip(module.named_modules(), plain.modules(), strict=True):
        assert type(child) is type(reference)
        assert vars(child).keys() == vars(reference).keys(), name
        for kind in HOOKS:
            assert vars(child)[f"_{kind}"].keys() == vars(reference)[f"_{kind}"].keys(), name
        for attribute, value in vars(child).items():
            assert not type(value).__module__.startswith("lightning_dist"), (name, attribute)
            if isinstance(value, (bool, int, float, str)):
                assert value == vars(reference)[attribute], (name, attribute)


def _assert_same_training(family: Any, module: nn.Module, plain: nn.Module) -> None:
    for network in (module, plain):
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        optimizer.zero_grad()
        family.loss(network).backward()
        optimizer.step()
    for ours, expected in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


class Layers(nn.Module):
    """torch's own layers, which TorchScript and torch.export take."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**LAYER), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def test_it_is_exported_as_before() -> None:
    run_on_ranks(2, _exported, timeout=120)


def _exported() -> None:
    torch.manual_seed(0)
    plain = Layers()
    module, x = copy.deepcopy(plain), torch.randn(2, 6, 32)
    patches = _on_the_axis(module, TensorOptions().sharding_plan(module, 2, find_blocks(module)))
    module(x).sum().backward()
    _taken_off(module, patches)
    module.eval(), plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(module(x), plain(x), rtol=0, atol=0)  # by the fast path, as before
        expected = torch.jit.script(plain)(x)
        torch.testing.assert_close(torch.jit.script(module)(x), expected, rtol=0, atol=0)
    exported = torch.export.export(module, (x,)).module()(x)
    torch.testing.assert_close(exported, torch.export.export(plain, (x,)).module()(x), rtol=0, atol=0)
