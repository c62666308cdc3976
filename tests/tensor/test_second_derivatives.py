"""Gradients of gradients through what the tensor axis divides, and penalties on weights that each rank uses in part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.collectives import Collectives
from tests.support.parity import TOLERANCE
from tests.support.ranks import run_on_ranks
from tests.tensor.networks import Network, divided_copy, inputs, whole

pytestmark = pytest.mark.sampled

WIDTH, WORDS = 16, 13


class Critic(nn.Module):
    """Attention with norms of heads and a feed-forward, over vectors; twice differentiable everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(
            timm.models.vision_transformer.Block(WIDTH, 4, qk_norm=True, init_values=0.5) for _ in range(2)
        )
        for block in self.blocks:
            block.attn.fused_attn = False
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Head(nn.Module):
    """An embedding, a head over the same words, and logits that a loss takes in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor, noise: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(ids).tanh() + noise))


def _critic(network: nn.Module) -> Tensor:
    """The loss of WGAN-GP."""
    torch.manual_seed(2)
    real, fake = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    mixed = real.lerp(fake, torch.rand(3, 1, 1)).requires_grad_()
    (gradient,) = torch.autograd.grad(network(mixed).sum(), mixed, create_graph=True)
    penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
    return network(fake).mean() - network(real).mean() + 10 * penalty


def _positions(network: nn.Module) -> Tensor:
    x, condition = (value.requires_grad_() for value in inputs())
    gradients = torch.autograd.grad(network(x, condition).square().sum(), [x, condition], create_graph=True)
    return sum(gradient.square().sum() for gradient in gradients)  # type: ignore[return-value]


def _head(network: nn.Module, kind: str) -> Tensor:
    torch.manual_seed(2)
    ids, noise = torch.randint(0, WORDS, (2, 6)), torch.randn(2, 6, WIDTH, requires_grad=True)
    logits = network(ids, noise)
    loss = {
        "cross-entropy": lambda: F.cross_entropy(logits.flatten(0, 1), ids.roll(1, 1).flatten()),
        "smoothed": lambda: F.cross_entropy(
            logits.flatten(0, 1), ids.roll(1, 1).flatten(), torch.arange(1.0, WORDS + 1), label_smoothing=0.2
        ),
        "probabilities": lambda: F.cross_entropy(logits.flatten(0, 1), torch.rand(12, WORDS).softmax(-1)),
        "maximum": lambda: logits.max(-1).values.square().sum() + logits.topk(3).values.exp().sum(),
        "other": lambda: logits.square().logsumexp(-1).sum(),
    }[kind]()
    (gradient,) = torch.autograd.grad(loss, noise, create_graph=True)
    return loss + gradient.square().sum() + (gradient**3).sum()


def _compare(
    network: Callable[[], nn.Module], loss: Callable[..., Tensor], args: Any, options: dict[str, bool]
) -> None:
    torch.manual_seed(0)
    plain = network().double()
    torch.set_default_dtype(torch.float64)
    try:
        divided, axis = divided_copy(plain, **options)
        expected, found = loss(plain, *args), loss(divided, *args)
        expected.backward()
        found.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    axis.after_backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    reference = dict(plain.named_parameters())
    for name, parameter in divided.named_parameters():
        other = reference[name].grad
        assert (parameter.grad is None) == (other is None), name
        if other is not None and other.norm() > 1e-12:
            assert (whole(parameter.grad) - other).norm() <= 1e-9 * other.norm(), name


def test_the_gradient_penalty_of_a_critic_equals_one_process() -> None:
    run_on_ranks(2, _compare, Critic, _critic, (), {})


def test_second_derivatives_through_divided_positions_equal_one_process() -> None:
    run_on_ranks(2, _compare, Network, _positions, (), {"sequence_parallel": True})


@pytest.mark.parametrize("loss_parallel", [True, False])
@pytest.mark.parametrize("kind", ["cross-entropy", "smoothed", "probabilities", "maximum", "other"])
def test_second_derivatives_through_a_vocabulary_equal_one_process(kind: str, loss_parallel: bool) -> None:
    run_on_ranks(2, _compare, Head, _head, (kind,), {"loss_parallel": loss_parallel})


def _norms(network: nn.Module) -> list[Tensor]:
    return [p for name, p in network.named_parameters() if "norm" in name and p.ndim == 1]


def _penalty(network: nn.Module) -> Tensor:
    weights = _norms(network)
    assert weights
    return _critic_loss(network) + sum((w - 0.3).square().sum() for w in weights)


def _critic_loss(network: nn.Module) -> Tensor:
    torch.manual_seed(2)
    return network(torch.randn(3, 5, 4)).square().mean()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_penalty_on_weights_that_each_rank_uses_in_part_counts_once(sequence_parallel: bool) -> None:
    run_on_ranks(2, _compare, Critic, _penalty, (), {"sequence_parallel": sequence_parallel})


def _asked(sequence_parallel: bool) -> None:
    torch.manual_seed(0)
    plain = Critic()
    divided, axis = divided_copy(plain, sequence_parallel=sequence_parallel)
    _critic_loss(divided)  # proved
    expected = torch.autograd.grad(_penalty(plain), _norms(plain))
    found = torch.autograd.grad(_penalty(divided), _norms(divided))
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=TOLERANCE, atol=1e-7)
    loss = _penalty(divided)
    with Collectives() as counted:
        loss.backward()
        axis.after_backward()
    blocks = 2
    assert counted.count["all-reduce"] + counted.count["reduce-scatter"] == 2 * blocks + 1
    reference = _penalty(plain)
    reference.backward()
    for value, other in zip(_norms(divided), _norms(plain), strict=True):
        torch.testing.assert_close(value.grad, other.grad, rtol=TOLERANCE, atol=1e-7)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_gradients_that_are_asked_for_are_whole_and_others_cost_one_all_reduce(sequence_parallel: bool) -> None:
    run_on_ranks(2, _asked, sequence_parallel)
