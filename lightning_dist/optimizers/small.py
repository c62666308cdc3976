"""Small tensors that stand for an optimizer's parameters: whole, and divided over the ranks as these are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_dist.compat.distributed import StridedShard
from lightning_dist.compat.operators import DTENSOR_ATTRIBUTES
from lightning_dist.dtensors import held_indices_of
from lightning_dist.placeholder import is_placeholder, placeholder_parameter

LONG, SHORT = 160, 4
"""Sizes of the two longest dims and of the others, at most: optimizers that factor do so from 128 on."""

NOT_OPTIONS = frozenset({"params", "lr", "initial_lr", "param_names", "name"})
"""Entries of a parameter group that don't change what a step does with it, but for its length."""


class Small:
    """What stands for one parameter.

    Args:
        parameter: of the module: plain, a DTensor or a placeholder.
        number: of it, from which its values are drawn: the same on every rank.
    """

    def __init__(self, parameter: Tensor, number: int) -> None:
        self.parameter = parameter
        generator = torch.Generator().manual_seed(number)
        shape, dtype = small_shape(parameter), small_dtype(parameter.dtype)
        self.device = parameter.device
        drawn = dtype if dtype.is_floating_point or dtype.is_complex else torch.float32
        self.value = torch.randn(shape, generator=generator, dtype=drawn).to(self.device, dtype)
        self.slope = torch.randn(shape, generator=generator, dtype=drawn).to(self.device, dtype)

    def whole(self) -> Tensor:
        """A plain parameter."""
        return _marked(nn.Parameter(self.value.clone(), self.parameter.requires_grad), self.parameter)

    def divided(self) -> Tensor:
        """As the parameter is: this rank's part of it, a plain tensor, or a placeholder."""
        return self.laid_out(self.value)

    def laid_out(self, value: Tensor) -> Tensor:
        """A whole small tensor as a parameter laid out as the real one."""
        if is_placeholder(self.parameter):
            return placeholder_parameter(_marked(nn.Parameter(value, self.parameter.requires_grad), self.parameter))
        return _marked(as_divided(value, self.parameter), self.parameter)


def as_divided(whole: Tensor, like: Tensor) -> nn.Parameter:
    """A parameter of the value ``whole``, divided over the ranks and of the class as the parameter ``like``."""
    if not isinstance(like, DTensor):
        return nn.Parameter(whole.clone(), like.requires_grad)
    part = this_ranks_part(whole, like)
    tensor = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    parameter: Any = nn.Parameter(tensor, like.requires_grad)
    if type(like) is not type(parameter):
        parameter.__class__ = type(like)
    return parameter


def this_ranks_part(whole: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of a tensor that is divided as ``like``, which may be of another size. A copy."""
    if not isinstance(like, DTensor):
        return whole.clone()
    part = whole.detach()
    for dim, index in enumerate(held_indices_of(whole.shape, like.device_mesh, like.placements)):
        part = part.index_select(dim, index.to(part.device))
    return part.clone(memory_format=torch.contiguous_format)


def small_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 in place of what rounds more."""
    return torch.float32 if dtype.is_floating_point and dtype != torch.float64 else dtype


def small_shape(parameter: Tensor) -> tuple[int, ...]:
    """As few elements as take the same way through an optimizer, divided as the parameter is."""
    units = [1] * parameter.ndim
    if isinstance(parameter, DTensor):
        for name, placement, ranks in zip(
            parameter.device_mesh.mesh_dim_names or (), parameter.placements, parameter.device_mesh.shape, strict=True
        ):
            if name == "tp" and not placement.is_replicate():
                pieces = placement.split_factor if isinstance(placement, StridedShard) else 1
                units[placement.dim] *= pieces * int(ranks)  # type: ignore[attr-defined, assignment]
    longest = sorted(range(parameter.ndim), key=lambda dim: -parameter.shape[dim])[:2]
    limits = [LONG if dim in longest else SHORT for dim in range(parameter.ndim)]
    return tuple(
        size if size <= limit or size <= unit else max(unit, limit - limit % unit)
        for size, limit, unit in zip(parameter.shape, limits, units, strict=True)
    )


def representatives(optimizer: Optimizer) -> list[Tensor]:
    """The largest and the smallest parameter of each kind, in each parameter group with options of its own."""
    chosen: dict[int, Tensor] = {}
    seen = set()
    for group in optimizer.param_groups:
        kinds: dict[Any, list[Tensor]] = {}
        for parameter in group["params"]:
            kinds.setdefault(_kind(parameter), []).append(parameter)
        options = repr([(name, group[name]) for name in sorted(group, key=str) if name not in NOT_OPTIONS])
        if (options, frozenset(kinds)) in seen:
            continue
        seen.add((options, frozenset(kinds)))
        for same in kinds.values():
            for parameter in (max(same, key=_size), min(same, key=_size)):
                chosen.setdefault(id(parameter), parameter)
    return list(chosen.values())


def all_parameters(groups: Iterable[dict[str, Any]]) -> list[Tensor]:
    """The parameters of all groups, each once."""
    return list({id(p): p for group in groups for p in group["params"]}.values())


def _size(parameter: Tensor) -> int:
    return math.prod(parameter.shape)


def _kind(parameter: Tensor) -> Any:
    layout = None
    if isinstance(parameter, DTensor):
        layout = (parameter.device_mesh, parameter.placements)
    return parameter.ndim, parameter.dtype, parameter.requires_grad, layout, is_placeholder(parameter)


def _marked(small: nn.Parameter, parameter: Tensor) -> nn.Parameter:
    """With what users wrote on the parameter, which optimizers may read."""
    for name, value in vars(parameter).items():
        if name not in DTENSOR_ATTRIBUTES:
            setattr(small, name, value)
    return small
