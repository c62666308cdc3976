"""Every family of networks on the tensor axis: outputs and gradients of one process, with the fewest collectives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_dist.parallel.tensor.split import split
from lightning_dist.patches import Patches
from lightning_dist.plans import find_blocks
from lightning_dist.plans.tensor import TensorOptions, partial_parameters
from tests.support.collectives import Collectives
from tests.support.ranks import RankError, run_on_ranks
from tests.tensor.families import FAMILIES, WITH_WHOLE_ATTENTION, WITHOUT_CHAIN
from tests.tensor.networks import whole

pytestmark = pytest.mark.sampled


def _compare(name: str, loss_parallel: bool, sequence_parallel: bool = False) -> dict[str, Any]:
    family = FAMILIES[name]
    torch.manual_seed(0)
    plain = family.network()
    divided = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("tp",))
    options = TensorOptions(None, sequence_parallel, loss_parallel)
    sharding_plan = options.sharding_plan(divided, mesh.size(), find_blocks(divided))
    assert sharding_plan is not None
    split(divided, sharding_plan, mesh, patches=Patches())
    with torch.no_grad():
        family.loss(divided)  # the first run proves the parts, which costs collectives of its own
    expected = family.loss(plain)
    expected.backward()
    with Collectives() as forward:
        loss = family.loss(divided)
    with Collectives() as backward:
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = _differences(plain, divided, set(partial_parameters(divided, sharding_plan)))
    plain.eval(), divided.eval()
    with torch.no_grad():
        torch.testing.assert_close(family.loss(divided), family.loss(plain), rtol=1e-5, atol=1e-6)
    divided.zero_grad()
    again = copy.deepcopy(divided)
    with torch.no_grad():
        torch.testing.assert_close(family.loss(again), family.loss(plain), rtol=1e-5, atol=1e-6)
    return {
        "plan": {n: part.split for n, part in sharding_plan.tensor_plan.items()},
        "stacks": len(sharding_plan.sequence_blocks),
        "gradients": gradients,
        "forward": dict(forward.count),
        "backward": dict(backward.count),
        "names": [n for n, _ in divided.named_parameters()] == [n for n, _ in plain.named_parameters()],
        "divided": [n for n, p in divided.named_parameters() if isinstance(p, DTensor)],
    }


def _differences(plain: nn.Module, divided: nn.Module, partial: set[str]) -> dict[str, float]:
    """Relative differences of the gradients that differ."""
    reference = dict(plain.named_parameters())
    found = {}
    # keys have biases that the softmax ignores: what is left of their gradients is rounding
    least = 1e-3 * float(torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]).norm())
    for name, parameter in divided.named_parameters():
        expected, gradient = reference[name].grad, parameter.grad
        assert parameter.shape == reference[name].shape
        if expected is None or gradient is None:
            assert (expected is None) == (gradient is None), name
            continue
        gradient = whole(gradient)
        if name in partial:
            torch.distributed.all_reduce(gradient)
        difference = float((gradient - expected).norm() / expected.norm().clamp(min=least))
        if difference > 1e-5:
            found[name] = difference
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_on_the_tensor_axis_equals_one_process(name: str) -> None:
    family = FAMILIES[name]
    for answer in run_on_ranks(2, _compare, name, False, timeout=60):
        assert answer["names"]
        assert answer["gradients"] == {}
        assert answer["divided"]
        weights = 1 if name == "torch attention" else 0
        assert answer["forward"].get("all-reduce") == family.parts + family.lookups + weights, answer["plan"]
        assert answer["forward"].get("all-gather", 0) <= bool(family.lookups)
        head = 1 if family.lookups else 0
        assert answer["backward"].get("all-reduce", 0) == family.parts + family.crossing + head - family.first
        assert set(answer["backward"]) <= {"all-reduce"}


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.lookups])
def test_a_divided_loss_equals_one_process_and_never_gathers(name: str) -> None:
    family = FAMILIES[name]
    gathers = name == "recipe decoder"  # whose loss here is no cross entropy
    for answer in run_on_ranks(2, _compare, name, True, timeout=60):
        assert answer["gradients"] == {}
        assert gathers or answer["forward"] == {"all-reduce": family.parts + family.lookups + 2}
        assert answer["backward"] == {"all-reduce": family.parts + family.crossing + 1}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in (*WITHOUT_CHAIN, *WITH_WHOLE_ATTENTION)])
def test_divided_positions_equal_one_process_with_the_same_bytes(name: str) -> None:
    """Per part one all-gather and one reduce-scatter each way; per chain one all-gather at either end."""
    family = FAMILIES[name]
    for answer in run_on_ranks(2, _compare, name, False, True, timeout=60):
        assert answer["gradients"] == {}
        head = 1 if family.lookups else 0
        stacks = answer["stacks"]
        assert answer["forward"].get("all-reduce", 0) == family.lookups
        assert answer["forward"]["reduce-scatter"] == family.parts
        assert answer["forward"]["all-gather"] == family.parts + stacks + head
        assert answer["backward"].get("all-reduce", 0) == family.crossing + head
        assert answer["backward"]["reduce-scatter"] == family.parts - family.first
        assert answer["backward"]["all-gather"] == family.parts + (stacks if not family.first else 0)


@pytest.mark.parametrize("name", WITH_WHOLE_ATTENTION)
def test_attention_that_is_whole_does_not_see_a_part_of_the_positions(name: str) -> None:
    with pytest.raises(RankError, match=r"tp runs .* on each rank's heads or columns, and that"):
        run_on_ranks(2, _compare, name, False, True, timeout=60)


@pytest.mark.parametrize("name", WITHOUT_CHAIN)
def test_networks_that_do_not_run_position_by_position_are_refused(name: str) -> None:
    network = FAMILIES[name].network()
    with pytest.raises(ValueError, match="sequence_parallel"):
        TensorOptions(None, sequence_parallel=True).sharding_plan(network, 2, find_blocks(network))
