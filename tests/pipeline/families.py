"""Networks that are cut without a change to them: how each is made, its inputs, and what a loss is taken of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
import transformers as hf
from torch import Tensor, nn

from recipes.image_classification.models import vision_transformer
from recipes.language_model.decoder import Decoder

WORDS = 48
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

Family = Callable[[], tuple[nn.Module, Any]]


def _images(size: int = 32, batch: int = 2) -> tuple[Tensor]:
    return (torch.randn(batch, 3, size, size),)


def _ids() -> dict[str, Tensor]:
    ids = torch.randint(0, WORDS, (2, 10))
    return {"input_ids": ids, "labels": ids}


def _torchvision(name: str, size: int = 32, **arguments: Any) -> Family:
    return lambda: (torchvision.models.get_model(name, weights=None, **arguments), _images(size))


def _timm(name: str, size: int = 32, **arguments: Any) -> Family:
    return lambda: (timm.create_model(name, num_classes=5, **arguments), _images(size))


def _causal(kind: str, **arguments: Any) -> Family:
    def make() -> tuple[nn.Module, Any]:
        config = getattr(hf, f"{kind}Config")(vocab_size=WORDS, **{**SIZES, **arguments})
        return getattr(hf, f"{kind}ForCausalLM")(config), _ids()

    return make


def _gpt2() -> tuple[nn.Module, Any]:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = hf.GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=4, n_head=4, n_positions=16, **dropout)
    return hf.GPT2LMHeadModel(config), _ids()


def _t5() -> tuple[nn.Module, Any]:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
    config = hf.T5Config(vocab_size=WORDS, **sizes, dropout_rate=0.0, decoder_start_token_id=0)
    return hf.T5ForConditionalGeneration(config), _ids()


def _hf_vit() -> tuple[nn.Module, Any]:
    config = hf.ViTConfig(image_size=16, patch_size=4, **SIZES, **NO_DROPOUT)
    return hf.ViTForImageClassification(config), {"pixel_values": _images(16)[0], "labels": torch.tensor([0, 1])}


def _encoder() -> tuple[nn.Module, Any]:
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4), (torch.randn(2, 10, 32),)


class UNet(nn.Module):
    """A skip from each level down to the same level up: several tensors cross every cut."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1)]
        )
        self.up = nn.ModuleList([nn.Conv2d(32, 8, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)])
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for conv in self.down:
            x = conv(x).relu_()
            kept.append(x)
        for conv, skip in zip(self.up, kept[-2::-1], strict=True):
            x = conv(torch.cat([nn.functional.interpolate(x, skip.shape[2:]), skip], 1))
        return self.head(x)


FAMILIES: dict[str, Family] = {
    "recipe decoder": lambda: (Decoder(WORDS, 32, 4, 4, 2), (torch.randint(0, WORDS, (2, 10)),)),
    "recipe vit": lambda: (vision_transformer(8, 3, 5, width=32, depth=4), _images(8)),
    "resnet18": _torchvision("resnet18"),
    "torchvision swin": lambda: (
        torchvision.models.SwinTransformer([4, 4], 24, [2, 2, 2], [3, 3, 6], [7, 7], stochastic_depth_prob=0.0),
        _images(),
    ),
    "convnext": _torchvision("convnext_tiny", stochastic_depth_prob=0.0),
    "efficientnet": _torchvision("efficientnet_b0", dropout=0.0, stochastic_depth_prob=0.0),
    "densenet": _torchvision("densenet121"),
    "torchvision vit": lambda: (
        torchvision.models.VisionTransformer(16, 4, 4, 4, 32, 48, num_classes=5),
        _images(16),
    ),
    "fcn": _torchvision("fcn_resnet50", 32, weights_backbone=None),
    "timm vit": _timm("vit_tiny_patch16_224", 16, img_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=4),
    "mixer": lambda: (
        timm.models.MlpMixer(num_classes=5, img_size=16, patch_size=4, embed_dim=32, num_blocks=4),
        _images(16),
    ),
    "cait": _timm("cait_xxs24_224", 16, img_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=4),
    "xcit": _timm("xcit_nano_12_p16_224", 32, img_size=32, embed_dim=32, depth=4, num_heads=4),
    "poolformer": _timm("poolformer_s12", 64),
    "vgg11": _timm("vgg11", 32, drop_rate=0.0),
    "sequencer2d": _timm("sequencer2d_s", 56, img_size=56, layers=(1, 1, 2, 1)),
    "levit": _timm("levit_128s", 224),
    "llama": _causal("Llama"),
    "qwen3": _causal("Qwen3", head_dim=8, num_key_value_heads=2),
    "mixtral": _causal("Mixtral", num_key_value_heads=2),
    "gpt2": _gpt2,
    "bert": lambda: (hf.BertForMaskedLM(hf.BertConfig(vocab_size=WORDS, **SIZES, **NO_DROPOUT)), _ids()),
    "hf vit": _hf_vit,
    "t5": _t5,
    "torch encoder": _encoder,
    "u-net": lambda: (UNet(), _images(16)),
}
