"""The networks by name, ``"library name"``: with few layers, narrow where the library lets them be, untrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from recipes.zoo.of_torch import OfTokens

WORDS, LENGTH, CLASSES = 48, 16, 5

SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "head_dim": 8,
}
EXPERTS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
SEQUENCES: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 0,
}
_T5 = {"d_kv": 8, "d_ff": 64, "num_layers": 2}
OWN: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global"], 4]]},
    "squeezebert": {"embedding_size": 32},
    "falcon": {"head_dim": None},
    "t5": _T5,
    "umt5": _T5,
}
"""What a model's config names otherwise; None for what it does not take."""


def kinds() -> dict[str, str]:
    """How each network is built, by its name, in the order of a table."""
    found: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("names.yaml")))
    return {
        f"{kind.split()[0]} {name}{' (images)' if kind.endswith('images') else ''}": kind
        for kind, those in found.items()
        for name in those
    }


def build(name: str) -> nn.Module:
    """The network of a name; draws from torch's generator.

    Raises:
        KeyError: there is none.
    """
    kind, own = kinds()[name], name.split()[1]
    if kind == "torch.nn":
        return OfTokens(own, WORDS)
    if kind == "torchvision":
        import torchvision

        return torchvision.models.get_model(own, weights=None, num_classes=CLASSES)
    if kind.startswith("timm"):
        import timm

        return timm.create_model(own, pretrained=False, num_classes=CLASSES, **_sizes_of_timm(kind, own))
    return _of_transformers(kind, own)


def _sizes_of_timm(kind: str, name: str) -> dict[str, Any]:
    if kind == "timm narrow":
        return {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4}
    return {"img_size": 64} if name.endswith("_224") else {}


def _of_transformers(kind: str, name: str) -> nn.Module:
    import transformers as hf

    made_by: dict[str, Any] = {
        "causal": hf.AutoModelForCausalLM,
        "experts": hf.AutoModelForCausalLM,
        "masked": hf.AutoModelForMaskedLM,
        "sequences": hf.AutoModelForSeq2SeqLM,
        "images": hf.AutoModelForImageClassification,
    }
    which = kind.split()[1]
    sizes = _image_sizes(name) if which == "images" else SIZES
    more = {"experts": EXPERTS, "sequences": SEQUENCES}.get(which, {})
    sizes = {key: value for key, value in {**sizes, **more, **OWN.get(name, {})}.items() if value is not None}
    # other kernels of experts take no float64
    how = {"experts_implementation": "eager"} if which == "experts" else {}
    return made_by[which].from_config(hf.AutoConfig.for_model(name, **sizes), **how)


def _image_sizes(name: str) -> dict[str, Any]:
    sizes: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_labels": CLASSES}
    if name in ("convnext", "convnextv2"):
        return {**sizes, "hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2}
    if name == "resnet":
        return {**sizes, "hidden_sizes": [16, 32], "depths": [1, 1], "embedding_size": 16, "layer_type": "basic"}
    if name == "poolformer":
        return {**sizes, "hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1], "patch_size": None}
    if name in ("swin", "swinv2"):
        return {**sizes, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 2}
    if name == "focalnet":
        sizes |= {"embed_dim": 16, "depths": [2, 2], "hidden_sizes": [16, 32], "patch_size": 2}
        return {**sizes, "focal_levels": [2, 2], "focal_windows": [3, 3]}
    names = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    return {**sizes, **{key: SIZES[key] for key in names}}


def reads_images(name: str) -> bool:
    """As opposed to tokens."""
    return name.split()[0] in ("timm", "torchvision") or name.endswith("(images)")


def samples(name: str, count: int) -> tuple[Tensor, ...]:
    """``(count, 3, size, size)`` and classes ``(count,)``, or tokens ``(count, length)``; the same every time."""
    generator = torch.Generator().manual_seed(2)
    if not reads_images(name):
        return (torch.randint(3, WORDS, (count, LENGTH), generator=generator),)
    size = 32 if name.startswith("transformers") or kinds()[name] == "timm narrow" else 64
    images = torch.randn(count, 3, size, size, generator=generator)
    return images, torch.randint(CLASSES, (count,), generator=generator)
