"""Numbers by which ranks compare tensors bit for bit, and gradients before they are reduced."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_dist.compat.distributed import gathered_of, param_groups_of
from lightning_dist.compat.torch import DisableTorchFunctionSubclass
from lightning_dist.dtensors import local_part
from lightning_dist.placeholder import held

COMPARED_AXES = ("dp_replicate", "dp_shard", "tp")
"""Along which ranks may hold the same parts of parameters."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def digest(tensors: Iterable[Tensor]) -> Tensor:
    """One int64 for what this rank holds of tensors: their bits, added up modulo 2**64, each tensor times an odd number
    of its own. One flipped bit always changes it. On the device of the first; nothing is copied, and no host waits.
    """
    total: Tensor | None = None
    for number, tensor in enumerate(tensors):
        sum_of_bits = _bits(local_part(tensor)).sum(dtype=torch.int64) * (2 * number + 1)
        total = sum_of_bits if total is None else total + sum_of_bits.to(total.device)
    return torch.zeros((), dtype=torch.int64) if total is None else total


def _bits(tensor: Tensor) -> Tensor:
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.ndim:
        tensor = tensor.reshape(1)
    return tensor.view(_BITS[tensor.element_size()])


def is_same_along(tensor: Tensor, axis: str) -> bool:
    """Whether the ranks along an axis of the layout hold the same of a parameter, or of its reduced gradient."""
    if not isinstance(tensor, DTensor):
        return True
    placements = dict(zip(tensor.device_mesh.mesh_dim_names or (), tensor.placements, strict=False))
    return axis not in placements or placements[axis].is_replicate()


def digests_by_axis(tensors: list[Tensor]) -> list[Tensor]:
    """For each of ``COMPARED_AXES``, a digest of what the ranks along it hold alike."""
    return [digest(t for t in tensors if is_same_along(t, axis)) for axis in COMPARED_AXES]


class LocalGradients:
    """What backward passes give this rank's parameters, before any rank is told of it: added up from its creation
    until :meth:`end`, by hooks on the leaves of autograd.

    Args:
        leaves: see :func:`leaves_of`.
        measure: of one gradient: its bits, or its norm where kernels are not deterministic.
    """

    def __init__(self, leaves: list[Tensor], measure: Callable[[Tensor], Tensor]) -> None:
        self._found: list[Tensor] = []
        self._leaves, self._measure = leaves, measure
        with DisableTorchFunctionSubclass():
            self._handles = [leaf.register_hook(partial(self._add, number)) for number, leaf in enumerate(leaves)]

    def again(self) -> LocalGradients:
        """Another one, of the same parameters."""
        return LocalGradients(self._leaves, self._measure)

    def _add(self, number: int, gradient: Any) -> None:
        self._found.append(self._measure(gradient) * (2 * number + 1))

    def end(self) -> Tensor:
        """The sum of all, on the CPU."""
        for handle in self._handles:
            handle.remove()
        device = self._found[0].device if self._found else torch.device("cpu")
        found, self._found = [one.to(device) for one in self._found], []
        return torch.stack(found).sum().cpu() if found else torch.zeros((), dtype=torch.int64)


def leaves_of(module: nn.Module) -> list[Tensor]:
    """What a backward pass through a module ends in: parameters, or what fully_shard gathers in their place, once it
    has.
    """
    gathered: dict[int, Tensor | None] = {}
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            for group in param_groups_of(unit):
                gathered.update((id(p.sharded_param), gathered_of(p)) for p in group.fsdp_params)
    with DisableTorchFunctionSubclass():
        leaves = (gathered.get(id(p), p) for p in held(module.parameters()))
        return [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]


def bits_of(gradient: Tensor) -> Tensor:
    """The measure by which one flipped bit is seen."""
    return digest([gradient])


@torch.no_grad()
def norm_of(gradient: Tensor) -> Tensor:
    """The measure for gradients that are not the same bit for bit."""
    local = local_part(gradient)
    return torch.linalg.vector_norm(local.coalesce().values() if local.is_sparse else local, dtype=torch.float64)
