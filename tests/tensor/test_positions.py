"""Sequence parallel: what a network may do between and inside its blocks, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from lightning_dist.parallel.tensor.split import TensorAxis, split
from lightning_dist.patches import Patches
from lightning_dist.plans import find_blocks
from lightning_dist.plans.tensor import TensorOptions, partial_parameters
from tests.support.collectives import Collectives
from tests.support.ranks import RankError, run_on_ranks
from tests.tensor.networks import POSITIONS, WIDTH, Conditioned, Network, inputs, whole


def _divide(network: nn.Module) -> TensorAxis:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    sharding_plan = TensorOptions(None, sequence_parallel=True).sharding_plan(network, 2, find_blocks(network))
    assert sharding_plan is not None
    split(network, sharding_plan, mesh, patches=Patches())
    return TensorAxis(network, partial_parameters(network, sharding_plan), mesh)


def _conditioned() -> None:
    torch.manual_seed(0)
    plain = Network()
    divided = copy.deepcopy(plain)
    axis = _divide(divided)
    for network in (plain, divided):
        F.mse_loss(network(*inputs()), torch.ones(3, POSITIONS, WIDTH)).backward()
    with Collectives() as counted:
        axis.after_backward()
    assert counted.count == {"all-reduce": 1}
    for (name, expected), parameter in zip(plain.named_parameters(), divided.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter.grad), expected.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_what_a_block_is_given_besides_gets_the_whole_gradient() -> None:
    """The gradient of the condition comes from all positions; so do those of what made it."""
    run_on_ranks(2, _conditioned)


def _as_it_is(x: Tensor) -> Tensor:
    return x.view_as(x)


def _centred_in_place(x: Tensor) -> Tensor:
    return x.sub_(x.mean(1, keepdim=True))


def _centred_where_it_was(x: Tensor) -> Tensor:
    """Its result may lie in the memory that the block's output had."""
    centred = x - x.mean(1, keepdim=True)
    del x
    return centred * 2


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def _with_a_token(x: Tensor) -> Tensor:
    return torch.cat([x, x[:, :1]], 1)


def _run(between: Callable[[Tensor], Tensor], last: int = 2) -> None:
    network = Network(between)
    axis = _divide(network)
    network.last = last
    network(*inputs())
    axis.after_step()


@pytest.mark.parametrize("between", [_centred, _centred_in_place, _centred_where_it_was, _with_a_token])
def test_a_network_that_works_between_its_blocks_is_refused(between: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RankError, match="is given another activation than the block before it returned"):
        run_on_ranks(2, _run, between)


def test_what_changes_nothing_between_blocks_runs() -> None:
    run_on_ranks(2, _run, _as_it_is)


def test_a_network_that_leaves_out_its_last_block_is_refused() -> None:
    with pytest.raises(RankError, match="after the last block, which the network did not run"):
        run_on_ranks(2, _run, _as_it_is, 1)


def test_norms_over_positions_are_refused() -> None:
    network = Network()
    network.blocks[0].norm = nn.BatchNorm1d(POSITIONS)
    with pytest.raises(ValueError, match=r"blocks\.0\.norm takes statistics over the positions"):
        TensorOptions(None, sequence_parallel=True).sharding_plan(network, 2, find_blocks(network))


class OtherKind(Conditioned):
    """A block of another kind, which is compared by itself."""


def _two_kinds() -> None:
    network = Network()
    network.blocks.extend(OtherKind() for _ in range(2))
    axis = _divide(network)
    network.last = 4
    network(*inputs())
    axis.after_step()


def test_blocks_of_several_kinds_follow_each_other() -> None:
    run_on_ranks(2, _two_kinds)


def test_a_weight_shared_with_what_lies_outside_the_blocks_is_refused() -> None:
    network = Network()
    network.embed.weight = network.stem.weight
    network.blocks[0].extra = nn.Linear(WIDTH, WIDTH, bias=False)
    network.blocks[0].extra.weight = network.stem.weight
    with pytest.raises(ValueError, match=r"are one parameter, .* leave sequence_parallel off"):
        TensorOptions(None, sequence_parallel=True).sharding_plan(network, 2, find_blocks(network))


class MixingPositions(Conditioned):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x - x.mean(1, keepdim=True), condition)


def _mixing() -> None:
    network = Network()
    network.blocks = nn.ModuleList(MixingPositions() for _ in range(2))
    _divide(network)
    network(*inputs())


def test_a_block_that_mixes_positions_itself_is_an_error() -> None:
    with pytest.raises(RankError, match=r"MixingPositions .* gives another result"):
        run_on_ranks(2, _mixing)


def _kept(dropout: float) -> tuple[Tensor, Tensor]:
    """What dropout keeps, and which samples stochastic depth keeps, as hooks see it: of all positions."""
    torch.manual_seed(0)
    network = Network(dropout=dropout).train()
    _divide(network)
    seen: dict[str, Tensor] = {}
    block = network.blocks[0]
    block.drop.register_forward_hook(lambda m, args, output: seen.update(kept=output != 0))
    block.drop_path.register_forward_hook(lambda m, args, output: seen.update(samples=output.flatten(1).any(1)))
    network(torch.randn(64, 8, WIDTH), torch.randn(64, WIDTH))
    return seen["kept"], seen["samples"]


def test_dropout_differs_between_positions_and_stochastic_depth_does_not() -> None:
    (first, samples), (second, same_samples) = run_on_ranks(2, _kept, 0.5)
    assert torch.equal(samples, same_samples)
    assert samples.any()
    assert not samples.all()
    assert torch.equal(first, second)
    agreement = (first[:, :4] == first[:, 4:]).float().mean()  # the positions of one rank, and of the other
    assert abs(float(agreement) - 0.5) < 0.05


def _set_up_twice() -> None:
    network = Network()
    _divide(network)
    sharding_plan = TensorOptions().sharding_plan(network, 2, {})
    assert sharding_plan is not None
    split(network, sharding_plan, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), patches=Patches())


def test_a_module_keeps_its_stacks() -> None:
    with pytest.raises(RankError, match="in an earlier run; build the module anew"):
        run_on_ranks(2, _set_up_twice)


def _two_lengths() -> None:
    """Two runs before their backward passes, of lengths that leave a rank as many positions."""
    from lightning_dist.parallel.activation_checkpoint import checkpoint_activations

    torch.manual_seed(0)
    plain = Network()
    divided = copy.deepcopy(plain)
    axis = _divide(divided)
    checkpoint_activations(divided, find_blocks(divided), "full", Patches())
    x, condition = inputs()
    losses = []
    for network in (plain, divided):
        losses.append(
            sum(network(part, condition).square().mean() for part in (x, x[:, :-1], torch.cat([x, x[:, :1]], 1)))
        )
        losses[-1].backward()
    axis.after_backward()
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    for (name, expected), parameter in zip(plain.named_parameters(), divided.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter.grad), expected.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_recomputed_blocks_know_which_length_they_ran() -> None:
    run_on_ranks(2, _two_lengths)
