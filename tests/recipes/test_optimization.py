"""Parameter groups and learning rates by step."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from recipes.image_classification.models import vision_transformer
from recipes.language_model.decoder import Decoder
from recipes.optimization import (
    parameter_groups,
    parameters_without_decay,
    warmup_constant,
    warmup_cosine,
)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight


def test_norms_and_biases_are_without_decay():
    network = vision_transformer(8, 1, 10, depth=1)
    without = parameters_without_decay(network)
    expected = {n for n, p in network.named_parameters() if "norm" in n or n.endswith("bias")} | {"pos_embed"}
    assert without == expected


def test_norm_weight_of_two_dims_is_without_decay():
    assert parameters_without_decay(nn.Sequential(nn.LayerNorm((3, 4)))) == {"0.weight", "0.bias"}


def test_every_trainable_parameter_is_in_one_group_once():
    network = Tied()
    decayed, plain = parameter_groups(network)
    assert [id(p) for p in decayed["params"]] == [id(network.embedding.weight)]
    expected = [network.norm.weight, network.norm.bias, network.head.bias]
    assert [id(p) for p in plain["params"]] == [id(p) for p in expected]
    assert plain["weight_decay"] == 0.0
    assert "weight_decay" not in decayed


@pytest.mark.parametrize("pattern", ["head.*", "embedding.*", "head.weight"])
def test_a_tied_parameter_has_the_rate_of_any_of_its_names(pattern):
    network = Tied()
    rates = {p: g.get("lr") for g in parameter_groups(network, None, {pattern: 0.5}) for p in g["params"]}
    assert len(rates) == 4
    assert rates[network.head.weight] == 0.5
    assert rates[network.head.bias] == (0.5 if pattern == "head.*" else None)


def test_groups_follow_the_shapes_before_wrapping():
    network = nn.Sequential(nn.Linear(3, 4))
    without = parameters_without_decay(network)
    flat = nn.Sequential(nn.Module())
    flat[0]._fsdp_wrapped_module = nn.Module()
    flat[0]._fsdp_wrapped_module.weight = nn.Parameter(torch.zeros(12))
    flat[0]._fsdp_wrapped_module.bias = nn.Parameter(torch.zeros(4))
    decayed, plain = parameter_groups(flat, without)
    assert [p.shape for p in decayed["params"]] == [(12,)]
    assert [p.shape for p in plain["params"]] == [(4,)]


def test_module_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False))


def test_decay_moves_weights_but_not_norms():
    network = Decoder(7, width=8, depth=1, num_heads=2)
    nn.init.ones_(network.head.weight)
    optimizer = torch.optim.AdamW(parameter_groups(network), lr=0.1, weight_decay=0.5)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(network.head.weight, torch.tensor(0.95))
    assert torch.equal(network.norm.weight, torch.ones(8))


def rates(schedule, steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = schedule(optimizer)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_cosine_rises_linearly_and_falls_to_its_end():
    seen = rates(partial(warmup_cosine, total_steps=20, warmup=4, final_factor=0.1), 21)
    assert seen[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert all(later < earlier for earlier, later in pairwise(seen[4:]))
    assert seen[12] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert seen[20] == pytest.approx(0.2)


def test_fraction_of_warmup_equals_its_steps():
    fraction, steps = (rates(partial(warmup_cosine, total_steps=40, warmup=w), 40) for w in (0.25, 10))
    assert fraction == steps


def test_constant_stays_after_warmup():
    assert rates(partial(warmup_constant, warmup=2), 4) == pytest.approx([1.0, 2.0, 2.0, 2.0])


@pytest.mark.parametrize("total_steps", [math.inf, -1])
def test_cosine_of_unknown_length_is_refused(total_steps):
    with pytest.raises(ValueError, match=r"set trainer\.max_steps"):
        rates(partial(warmup_cosine, total_steps=total_steps), 1)


@pytest.mark.parametrize("warmup", [-1, 11])
def test_warmup_outside_the_run_is_refused(warmup):
    with pytest.raises(ValueError, match="warmup"):
        rates(partial(warmup_cosine, total_steps=10, warmup=warmup), 1)
