"""Classifiers by plain arguments: timm's, torchvision's, and a small vision transformer."""

from __future__ import annotations

import difflib
from typing import Any, Literal

import timm
import torchvision
from timm.models import VisionTransformer
from torch import nn

SMALLEST_FOR_IMAGENET_STEM = 24
"""Below this many pixels a side, a stem that reduces by four leaves too little to look at."""


def vision_transformer(
    image_size: int,
    in_channels: int,
    num_classes: int,
    *,
    patch_size: int = 2,
    width: int = 64,
    depth: int = 3,
    num_heads: int = 4,
    mlp_ratio: float = 2.0,
    dropout: float = 0.0,
    position_std: float = 0.5,
) -> nn.Module:
    """A vision transformer (https://arxiv.org/abs/2010.11929) of any size, with mean pooling.

    Args:
        image_size: pixels a side.
        in_channels: channels of an image.
        num_classes: number of classes.
        patch_size: pixels a side of a patch; divides ``image_size``.
        width: features of a token; ``num_heads`` divides it.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the feed-forward layer over ``width``.
        dropout: of the feed-forward and projection layers.
        position_std: standard deviation of the initial position embedding. The usual 0.02 drowns in the embedding
            of a narrow network's patches, and mean pooling then sees a bag of patches for many epochs.

    Raises:
        ValueError: sizes that do not divide.
    """
    if image_size % patch_size:
        raise ValueError(f"patch_size={patch_size} does not divide image_size={image_size}; pass a divisor of it")
    if width % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide width={width}; pass a divisor of it")
    network = VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=in_channels,
        num_classes=num_classes,
        embed_dim=width,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        proj_drop_rate=dropout,
        class_token=False,
        global_pool="avg",
    )
    assert network.pos_embed is not None
    nn.init.normal_(network.pos_embed, std=position_std)
    return network


def timm_classifier(
    name: str, image_size: int, in_channels: int, num_classes: int, *, pretrained: bool = False, **arguments: Any
) -> nn.Module:
    """Any classifier of timm.

    Args:
        name: timm's name, such as ``"convnext_atto"``; ``timm.list_models()`` has them all.
        image_size: pixels a side; passed on only to networks that are built for one size.
        in_channels: channels of an image.
        num_classes: number of classes.
        pretrained: load timm's weights, which are downloaded if they are not in its cache.
        arguments: passed to ``timm.create_model``.

    Raises:
        ValueError: timm has no such network; the message names the closest.
    """
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}{_closest(name, timm.list_models())}")
    arguments = {"in_chans": in_channels, "num_classes": num_classes, "pretrained": pretrained, **arguments}
    try:
        return timm.create_model(name, img_size=image_size, **arguments)
    except TypeError as error:
        # Convolutional networks take any size, and say so by having no such argument.
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, **arguments)


def torchvision_classifier(
    name: str,
    image_size: int,
    in_channels: int,
    num_classes: int,
    *,
    stem: Literal["auto", "imagenet", "small"] = "auto",
    **arguments: Any,
) -> nn.Module:
    """Any classifier of torchvision, with initial weights of its own kind.

    Args:
        name: torchvision's name, such as ``"resnet18"``.
        image_size: pixels a side; passed on to vision transformers, and decides ``stem="auto"``.
        in_channels: channels of an image; the first convolution is made anew if this is not 3.
        num_classes: number of classes.
        stem: of residual networks. ``"imagenet"`` reduces the image by four at once (7 x 7 convolution of stride
            2, max pooling); ``"small"`` keeps its size (3 x 3 of stride 1, no pooling), which sees more and costs
            about seven times as much; ``"auto"`` takes ``"small"`` below 24 pixels a side.
        arguments: passed to torchvision's builder.

    Raises:
        ValueError: torchvision has no such network, or ``stem`` is asked of one that is no residual network.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(f"torchvision has no classifier {name!r}{_closest(name, known)}")
    if name.startswith("vit_"):
        arguments = {"image_size": image_size, **arguments}
    network = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **arguments)
    if isinstance(network, torchvision.models.ResNet):
        if stem == "small" or (stem == "auto" and image_size < SMALLEST_FOR_IMAGENET_STEM):
            use_small_stem(network)
    elif stem != "auto":
        raise ValueError(f"stem={stem!r} is for torchvision's residual networks, and {name} is none; leave it out")
    if in_channels != 3:
        replace_input_channels(network, in_channels)
    return network


def use_small_stem(network: torchvision.models.ResNet) -> None:
    """Makes a residual network keep the size of the image up to its first stage: 3 x 3, stride 1, no pooling."""
    network.conv1 = nn.Conv2d(network.conv1.in_channels, network.conv1.out_channels, 3, 1, 1, bias=False)
    _initialize_as_resnet(network.conv1)
    network.maxpool = nn.Identity()


def replace_input_channels(network: nn.Module, in_channels: int) -> None:
    """Makes the first convolution of a network read ``in_channels`` channels, with new initial weights.

    Raises:
        ValueError: no convolution reads three channels.
    """
    colour = [
        (name, child)
        for name, child in network.named_modules()
        if isinstance(child, nn.Conv2d) and child.in_channels == 3
    ]
    if not colour:
        raise ValueError(
            f"{type(network).__name__} has no convolution of 3 input channels to replace by {in_channels}; "
            "repeat the image's channels, or take model=timm"
        )
    name, old = colour[0]
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None,
        padding_mode=old.padding_mode,
    )
    _initialize_as_resnet(new)
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, new)


def _initialize_as_resnet(convolution: nn.Conv2d) -> None:
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)


def _closest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; the closest are {', '.join(close)}" if close else ""
