"""Experiments that no machine here trains: composed, and explained without memory for a parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_dist.cli import main
from lightning_dist.explain import build_deferred
from lightning_dist.strategy import HybridStrategy
from recipes.explain import from_overrides


def llama(width: int, depth: int, heads: int, feed_forward: int) -> int:
    """Parameters of transformers' own, with 8 heads for keys and values and Llama 3's vocabulary."""
    sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": feed_forward}
    config = LlamaConfig(vocab_size=128256, num_attention_heads=heads, num_key_value_heads=8, **sizes)
    with torch.device("meta"):
        return sum(p.numel() for p in LlamaForCausalLM(config).parameters())


def torchvisions(name: str) -> int:
    """Parameters that torchvision says its published weights have."""
    return torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "num_parameters", "num_ranks", "share"),
    [
        ("imagenet_resnet50", lambda: torchvisions("resnet50"), 8, 1.0),
        ("imagenet_vit_large", lambda: torchvisions("vit_l_16"), 8, 1 / 8),
        ("llama3_8b", lambda: llama(4096, 32, 32, 14336), 8, 1 / 8),
        ("llama3_70b", lambda: llama(8192, 80, 64, 28672), 64, 1 / 64),
    ],
)
def test_a_large_experiment_is_explained(name: str, num_parameters: Any, num_ranks: int, share: float) -> None:
    """The network has the size of the one that it is named after, and a rank holds its share of it."""
    subject = from_overrides([f"experiment={name}", "trainer.accelerator=cpu"])
    assert subject.num_ranks == num_ranks
    module = build_deferred(subject.make)
    assert all(p.is_meta for p in module.parameters())
    assert sum(p.numel() for p in module.parameters()) == num_parameters()
    assert isinstance(subject.strategy, HybridStrategy)
    report = subject.strategy.explain(module, num_ranks)
    assert report.rank_bytes / report.whole_bytes == pytest.approx(share, rel=0.02)


def test_the_command_explains_one_under_another_layout(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["trainer.num_nodes=1", "strategy.layout.tp=2", "strategy.layout.dp_shard=4"]
    assert main(["explain", "experiment=llama3_8b", *layout]) == 0
    output = capsys.readouterr().out
    assert "model.blocks.*" in output
    assert "8,030,261,248" in output or "8.03" in output
