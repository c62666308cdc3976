"""The blocks of networks that nobody wrote for this project."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchmetrics
import torchvision
import transformers
from torch import nn

from lightning_dist.layout import Layout
from lightning_dist.parallel.fsdp_units import shard_roots, shard_units, unsharded_parameters
from lightning_dist.plans import find_blocks, select_blocks
from lightning_dist.ranks import ROOM, choose_layout, state_bytes
from tests.support import models

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))


def t5() -> nn.Module:
    config = transformers.T5Config(d_model=16, d_ff=32, num_layers=2, num_heads=2, vocab_size=32, d_kv=8)
    return transformers.T5ForConditionalGeneration(config)


FAMILIES: list[tuple[Callable[[], nn.Module], int, str]] = [
    (lambda: torchvision.models.resnet18(), 8, "layer1.0"),
    (lambda: torchvision.models.swin_t(), 15, "features.1.0"),
    (lambda: torchvision.models.convnext_tiny(), 18, "features.1.0"),
    (lambda: timm.create_model("vit_tiny_patch16_224", depth=3), 3, "blocks.0"),
    (lambda: timm.create_model("mixer_s32_224"), 8, "blocks.0"),
    (llama, 2, "model.layers.0"),
    (bert, 2, "bert.encoder.layer.0"),
    (t5, 4, "encoder.block.0"),
    (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 3), 3, "layers.0"),
    (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), 0, ""),
]


@pytest.mark.parametrize(("build", "count", "first"), FAMILIES, ids=lambda value: getattr(value, "__name__", None))
def test_repeated_blocks_are_found(build: Callable[[], nn.Module], count: int, first: str) -> None:
    blocks = find_blocks(build())
    assert len(blocks) == count, list(blocks)
    assert not first or first in blocks


def test_networks_of_metrics_are_left_alone() -> None:
    class Perceptual(torchmetrics.MeanMetric):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(models.Block(), models.Block())

    module = models.Classifier()
    module.quality = Perceptual()
    assert list(find_blocks(module)) == ["net.blocks.0", "net.blocks.1", "net.blocks.2"]
    assert unsharded_parameters(module, shard_units(module, find_blocks(module))) == set(module.quality.parameters())


def test_nested_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="inside it; choose one of them"):
        select_blocks(models.Classifier(), ["net.blocks.0", "net.blocks.0.up"])


def test_blocks_that_share_a_parameter_belong_to_the_root() -> None:
    module = models.TiedBlocks()
    assert list(shard_units(module, find_blocks(module))) == ["net.blocks.2"]


def test_roots_follow_the_kind_of_optimisation() -> None:
    assert list(shard_roots(models.Classifier())) == [""]
    assert list(shard_roots(models.Adversarial())) == ["generator", "critic"]


@pytest.mark.parametrize(
    ("share", "layout", "why"),
    [
        (0.2, Layout(dp_shard=4), "even over 4 shards that is more than"),
        (0.3, Layout(dp_shard=4), "over 4 shards that fits"),
        (0.6, Layout(dp_replicate=2, dp_shard=2), "over 2 shards that fits"),
        (1.1, Layout(dp_replicate=4), "which fits"),
    ],
)
def test_auto_shards_as_little_as_fits(share: float, layout: Layout, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = models.Classifier()
    room = int(share * state_bytes(module) / ROOM)
    monkeypatch.setattr("lightning_dist.ranks._memory", lambda *_: room)
    chosen, reason = choose_layout(module, 4, torch.device("cpu"), 4)
    assert chosen == layout
    assert why in reason
