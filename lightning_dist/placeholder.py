"""Parameters of other stages: tensors with a shape and a dtype, and no memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dist.compat.torch import FakeTensor, FakeTensorMode

SHAPES = FakeTensorMode(allow_non_fake_inputs=True)
"""The one mode of all placeholders, as torch mixes no two. It is never entered, so what depends on no placeholder is
computed for real: masks, positions, rotary tables."""


PIPELINE_SHARE = "lightning_dist_pipeline_share"
"""Attribute of a parameter that stages hold: ranks of the pipeline for each that holds it."""


def placeholder(tensor: Tensor, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor like this one without its memory; also of one on meta, or of a part of a DTensor's whole."""
    dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    with SHAPES:
        return torch.empty_strided(shape, stride, dtype=dtype, device=device or tensor.device)


def placeholder_parameter(parameter: nn.Parameter, device: torch.device | None = None) -> nn.Parameter:
    """In place of a parameter that another stage owns: ``parameters()``, its names and an optimizer's groups stay."""
    standin = nn.Parameter(placeholder(parameter.detach(), device), requires_grad=parameter.requires_grad)
    take_marks(standin, parameter)
    return standin


def take_marks(tensor: Tensor, of: Tensor) -> None:
    """Gives a tensor the attributes that transformers and users put on another; those that make it a fake stay."""
    vars(tensor).update({**vars(of), **vars(tensor)})


def is_placeholder(value: Any) -> bool:
    """Whether this is the tensor of another stage."""
    return isinstance(value, FakeTensor) and value.fake_mode is SHAPES


def held(parameters: Iterable[Any]) -> list[Any]:
    """The parameters that this rank holds, in their order."""
    return [p for p in parameters if not is_placeholder(p)]
