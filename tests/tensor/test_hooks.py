"""Users' hooks inside of what the tensor axis divides: they see, and change, what they would in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_dist.parallel.tensor.split import TensorAxis
from tests.support.collectives import Collectives
from tests.support.ranks import RankError, run_on_ranks
from tests.tensor.families import FAMILIES
from tests.tensor.networks import Network, divided_copy, inputs, whole

pytestmark = pytest.mark.sampled

HOOKED = ["timm vit norms", "llama", "bert", "torch transformer", "eva", "t5", "timm swin", "mixer"]
HOOKED += ["opt", "bart", "pair in a block"]


def _leaves(network: nn.Module) -> list[str]:
    """Modules without others inside, but those that a fused attention does not call."""
    return [n for n, child in network.named_modules() if n and not list(child.children()) and "out_proj" not in n]


def _floats(values: Any) -> list[Tensor]:
    return [v for v in tree_leaves(values) if isinstance(v, Tensor) and v.is_floating_point()]


def _trained(
    network: nn.Module, loss: Callable[[nn.Module], Tensor], axis: TensorAxis | None = None
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """What hooks see on every layer, and the gradients of a loss that has all of it."""
    seen: list[Tensor] = []
    means: list[Tensor] = []

    def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        values = _floats((args, kwargs, output))
        seen.extend(value.detach().clone() for value in values)
        means.extend((value - 0.5).square().mean() for value in values if value.isfinite().all())

    handles = [network.get_submodule(n).register_forward_hook(look, with_kwargs=True) for n in _leaves(network)]
    total = loss(network) + torch.stack(means).sum()
    for handle in handles:
        handle.remove()
    total.backward()
    if axis is not None:
        axis.after_backward()
    gradients = {n: None if p.grad is None else whole(p.grad) for n, p in network.named_parameters()}
    return [total.detach(), *seen], gradients


def _assert_same(found: Any, expected: Any) -> None:
    assert len(found[0]) == len(expected[0])
    for value, other in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)
    scale = max(float(g.norm()) for g in expected[1].values() if g is not None)
    for name, other in expected[1].items():
        value = found[1][name]
        assert (value is None) == (other is None), name
        if other is not None:
            assert float((value - other).norm()) <= 1e-5 * max(float(other.norm()), 1e-2 * scale), name


def _look(family: str) -> None:
    torch.manual_seed(0)
    plain = FAMILIES[family].network()
    divided, axis = divided_copy(plain)
    loss = FAMILIES[family].loss
    found = _trained(divided, loss, axis)
    _assert_same(found, _trained(plain, loss))
    assert not any(vars(child)["_forward_hooks"] for child in divided.modules())
    for network in (plain, divided):
        network.zero_grad()
    _assert_same(_trained(divided, loss, axis), _trained(plain, loss))


@pytest.mark.parametrize("family", HOOKED)
def test_hooks_on_every_layer_see_whole_activations_and_a_loss_of_them_has_one_gradient(family: str) -> None:
    run_on_ranks(2, _look, family)


class Uneven(nn.Module):
    """A gated feed-forward whose columns don't divide; ``act`` runs on one part of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 13), nn.Linear(8, 13)
        self.act, self.down_proj = nn.SiLU(), nn.Linear(13, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


def _change(num_calls: int) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), Uneven(), Uneven())
    divided, axis = divided_copy(plain)
    x = torch.randn(3, 5, 8)
    found = []
    for network, own in ((divided, axis), (plain, None)):
        kept: list[Any] = []

        def centre(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output - output.mean(-1, keepdim=True)

        def in_place(module: nn.Module, args: Any, output: Tensor, kept: list[Any] = kept) -> None:
            output.mul_(output.detach().abs().amax(-1, keepdim=True))
            output.retain_grad()
            kept.append(output)

        def roll(module: nn.Module, args: Any) -> Tensor:
            return args[0].roll(1, -1)

        network[1].gate_proj.register_forward_hook(centre)
        network[1].up_proj.register_forward_pre_hook(roll)
        network[2].act.register_forward_hook(in_place)
        network[2].down_proj.register_forward_pre_hook(roll)
        for _ in range(num_calls):
            network(x).square().mean().backward()
        if own is not None:
            own.after_backward()
        grads = {n: whole(p.grad) for n, p in network.named_parameters()}
        found.append(([*kept, *(k.grad for k in kept)], grads))
        assert len(kept) == num_calls
    _assert_same(*found)


@pytest.mark.parametrize("num_calls", [1, 3])
def test_what_hooks_change_goes_on_and_gradients_they_keep_are_whole(num_calls: int) -> None:
    run_on_ranks(2, _change, num_calls)


def _positions() -> None:
    torch.manual_seed(0)
    plain = Network()
    divided, axis = divided_copy(plain, sequence_parallel=True)

    def loss(network: nn.Module) -> Tensor:
        return network(*inputs()).square().mean()

    for _ in range(2):
        for network in (plain, divided):
            network.zero_grad()
        _assert_same(_trained(divided, loss, axis), _trained(plain, loss))


def test_hooks_inside_of_blocks_see_all_positions() -> None:
    run_on_ranks(2, _positions)


def _on_block(kind: str) -> None:
    divided, _ = divided_copy(Network(), sequence_parallel=True)
    getattr(divided.blocks[0], f"register_{kind}")(lambda *_: None)
    divided(*inputs())


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_hooks_on_blocks_that_hand_on_positions_are_refused(kind: str) -> None:
    with pytest.raises(RankError, match=r"sequence_parallel: blocks\.0 has hooks"):
        run_on_ranks(2, _on_block, kind)


def _backward(kind: str, layer: str) -> None:
    divided, _ = divided_copy(nn.Sequential(nn.Linear(8, 8), Uneven()))
    getattr(divided.get_submodule(layer), f"register_{kind}")(lambda *_: None)
    divided(torch.randn(3, 8)).sum().backward()


@pytest.mark.parametrize("kind", ["full_backward_hook", "full_backward_pre_hook"])
@pytest.mark.parametrize("layer", ["1.gate_proj", "1.act", "1.down_proj"])
def test_hooks_on_the_backward_of_a_part_are_refused(kind: str, layer: str) -> None:
    with pytest.raises(RankError, match="a hook on its backward would see this rank's part"):
        run_on_ranks(2, _backward, kind, layer)


class Merging(Uneven):
    """What its activation is given is no part of the whole one in any way that is known."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.gate_proj(x)
        return self.down_proj(self.act(hidden.flatten()).view_as(hidden) * self.up_proj(x))


def _merged(batch_size: int) -> None:
    divided, _ = divided_copy(nn.Sequential(nn.Linear(8, 8), Merging()))
    divided[1].act.register_forward_hook(lambda *_: None)
    divided(torch.randn(batch_size, 8))
    divided(torch.randn(6, 8))


@pytest.mark.parametrize(("batch_size", "why"), [(5, "is no part of the whole one"), (3, "is divided in another way")])
def test_an_activation_that_is_no_known_part_is_refused(batch_size: int, why: str) -> None:
    """Of three samples, each rank has its part of three pieces; of six, which looks alike, it hasn't."""
    with pytest.raises(RankError, match=f"tp: act, a SiLU, has hooks .* {why}"):
        run_on_ranks(2, _merged, batch_size)


def _count(hooks: bool) -> tuple[int, dict[str, int]]:
    divided, _ = divided_copy(nn.Sequential(nn.Linear(8, 8), Uneven()))
    num_calls = 0

    def count(*_: Any) -> None:
        nonlocal num_calls
        num_calls += 1

    if hooks:
        divided[1].act.register_forward_hook(count)
    x = torch.randn(3, 8)
    divided(x)
    assert num_calls == hooks
    with Collectives() as counted:
        divided(x).sum().backward()
    assert num_calls == 2 * hooks
    return num_calls, dict(tree_map(int, dict(counted.count)))


def test_a_hook_is_called_once_a_call_and_without_hooks_nothing_is_gathered() -> None:
    for _, counts in run_on_ranks(2, _count, False):
        assert counts == {"all-reduce": 2}
    for _, counts in run_on_ranks(2, _count, True):
        assert counts == {"all-reduce": 2, "all-gather": 3}
