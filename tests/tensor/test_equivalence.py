"""Parts are proved: what a plan takes for attention or feed-forward, and is not, is an error and no other number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_dist.parallel.tensor.split import split
from lightning_dist.patches import Patches
from lightning_dist.plans.tensor import ShardingPlan, find_tensor_plan
from tests.support import models
from tests.support.models import samples
from tests.support.parity import Run, on_layout
from tests.support.ranks import RankError, run_on_ranks

WIDTH, HEADS = 32, 4


class Attention(nn.Module):
    """As many write it; ``own_scale`` hangs on the number of heads, of which a rank has its own."""

    def __init__(self, own_scale: bool) -> None:
        super().__init__()
        self.num_heads, self.own_scale = HEADS, own_scale
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        width = self.num_heads if self.own_scale else q.shape[-1]
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=width**-0.5).transpose(1, 2).flatten(2))


class Folded(Attention):
    """Its heads are folded into the batch, which it tells again by their number."""

    def __init__(self) -> None:
        super().__init__(False)

    def forward(self, x: Tensor) -> Tensor:
        folded = [
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).flatten(0, 1)
            for layer in (self.query, self.key, self.value)
        ]
        mixed = F.scaled_dot_product_attention(*folded)
        batch = mixed.shape[0] // self.num_heads
        return self.proj(mixed.view(batch, self.num_heads, *mixed.shape[1:]).transpose(1, 2).flatten(2))


class CentredFeedForward(nn.Module):
    """Its activation looks at all columns."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).softmax(-1))


class FromZero(CentredFeedForward):
    """The same, and begins as nothing: its last layer, which would hide all that lies before it."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.fc2.weight)


class Peak(nn.Module):
    """Keeps the largest of the hidden features, which one of the ranks has right."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.peak = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x).relu()
        self.peak = hidden.detach().amax()
        return self.fc2(hidden)


class Counting(nn.Module):
    """Sets a number of its own that hangs on what the rank has: another in each step, and on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.sparsity = 0.0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x).relu()
        self.sparsity = float((hidden == 0).float().mean())
        return self.fc2(hidden)


def _attention(own_scale: bool) -> nn.Module:
    return nn.Sequential(Attention(own_scale), Attention(own_scale))


def _run(network: Any, *args: Any) -> Tensor:
    torch.manual_seed(0)
    module = network(*args).train()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    split(module, ShardingPlan(find_tensor_plan(module)), mesh, patches=Patches())
    return module(torch.randn(2, 5, WIDTH)).detach()


def test_a_part_that_gives_the_whole_result_runs() -> None:
    torch.manual_seed(0)
    expected = _attention(False)(torch.randn(2, 5, WIDTH))
    for output in run_on_ranks(2, _run, _attention, False):
        torch.testing.assert_close(output, expected.detach(), rtol=1e-5, atol=1e-6)


def _folded() -> Tensor:
    """Of so many samples that they have, by a rank's heads, the width of all heads."""
    torch.manual_seed(0)
    module = Folded()
    x = torch.randn(WIDTH // (HEADS // 2), 5, WIDTH)
    expected = module(x)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    split(module, ShardingPlan(find_tensor_plan(module)), mesh, patches=Patches())
    return (module(x) - expected).abs().max().detach()


def test_heads_are_plain_numbers_where_these_do() -> None:
    assert max(run_on_ranks(2, _folded)) < 1e-5


@pytest.mark.parametrize(
    ("network", "args", "name"),
    [
        (_attention, (True,), "Attention"),
        (CentredFeedForward, (), "CentredFeedForward"),
        (FromZero, (), "FromZero"),
    ],
)
def test_a_part_that_gives_another_result_is_an_error(network: Any, args: Any, name: str) -> None:
    with pytest.raises(RankError, match=rf"tp runs {name} .* gives another result"):
        run_on_ranks(2, _run, network, *args)


class Recomputing(CentredFeedForward):
    """Computes its layers again in backward, when it is no part any more."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: self.fc2(self.fc1(x).relu()), x, use_reentrant=False)


def test_a_backward_that_fails_in_part_is_an_error_in_the_first_forward() -> None:
    for told in run_on_ranks(2, _told, Recomputing):
        assert told.startswith("tp runs Recomputing on each rank's heads or columns, and its backward fails: ")
        assert "Name the layers that may be divided in tensor_plan=" in told


def test_what_one_rank_keeps_rightly_is_an_error_on_all() -> None:
    for told in run_on_ranks(2, _told, Peak):
        assert "its forward keeps" in told


def _told(network: Any, *args: Any) -> str:
    try:
        _run(network, *args)
    except ValueError as error:
        return str(error)
    return ""


def _weight_of_zeros() -> Tensor:
    torch.manual_seed(0)
    module = nn.Sequential(Mlp(), Mlp())
    nn.init.zeros_(module[0].fc2.weight)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    split(module, ShardingPlan(find_tensor_plan(module)), mesh, patches=Patches())
    module(torch.randn(2, 5, WIDTH)).sum().backward()
    return module[0].fc2.weight.full_tensor().detach()  # type: ignore[union-attr, operator]


def test_a_weight_of_zeros_is_left_as_it_was() -> None:
    for weight in run_on_ranks(2, _weight_of_zeros):
        assert not weight.any()


class ResidualInside(nn.Module):
    """Uses its input beside its divided layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.fc1(x).relu())


def _above_frozen() -> nn.Module:
    """The first layer is frozen, so that no gradient is asked of it; the others train."""
    layers = nn.Sequential(ResidualInside(), ResidualInside(), ResidualInside())
    layers[0].requires_grad_(False)
    return layers


def test_another_gradient_is_an_error_also_where_the_first_layers_are_frozen() -> None:
    with pytest.raises(RankError, match=r"tp runs ResidualInside .* sends another gradient to its input"):
        run_on_ranks(2, _run, _above_frozen)


def test_every_rank_raises() -> None:
    assert all(run_on_ranks(2, _told, _attention, True))


def test_only_the_first_of_a_kind_is_compared() -> None:
    assert run_on_ranks(2, _num_checks, _two_kinds) == [2, 2]


def test_a_number_that_a_module_sets_itself_makes_it_no_other_kind() -> None:
    assert run_on_ranks(2, _num_checks, Counting) == [1, 1]


def _two_kinds() -> nn.Module:
    """Two attention modules alike, and one feed-forward."""
    return nn.Sequential(_attention(False), Mlp())


def _num_checks(network: Any) -> int:
    """Of a network that runs three times."""
    from lightning_dist.parallel.tensor.equivalence import EquivalenceCheck

    runs: list[str] = []
    original = EquivalenceCheck.run

    def noting(self: Any, module: nn.Module, *args: Any) -> Any:
        runs.append(type(module).__name__)
        return original(self, module, *args)

    EquivalenceCheck.run = noting  # type: ignore[method-assign]
    try:
        module = network()
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        split(module, ShardingPlan(find_tensor_plan(module)), mesh, patches=Patches())
        for _ in range(3):
            module(torch.randn(2, 5, WIDTH))
    finally:
        EquivalenceCheck.run = original  # type: ignore[method-assign]
    return len(runs)


class Mlp(CentredFeedForward):
    """Plain."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


class OwnResidual(nn.Module):
    """A feed-forward module that adds its input by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(models.WIDTH, 2 * models.WIDTH), nn.Linear(2 * models.WIDTH, models.WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(x)))


class WithOwnResidual(models.Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(models.WIDTH, models.WIDTH), OwnResidual(), nn.Linear(models.WIDTH, models.CLASSES)
        )


def test_a_part_that_sends_another_gradient_to_its_input_is_refused() -> None:
    with pytest.raises(RankError, match="sends another gradient to its input than the whole module"):
        on_layout(Run(WithOwnResidual, samples), "tp=2", 2)
