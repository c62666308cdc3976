"""Where a rank's part of an activation lies in the whole, found by value; from the part to the whole and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lightning_dist.parallel.tensor.equivalence import rounding_of
from lightning_dist.parallel.tensor.mappings import (
    copy_to_tensor_region,
    gather,
    present,
    scaled_gradient,
    scatter,
    scatter_to_sequence_region,
)
from lightning_dist.parallel.tensor.shards import shard_of, shard_placement

PACKED = (1, 2, 3)
"""Into how many pieces, of each of which a rank has its part, an activation is cut: a gate and values; q, k and v."""


@dataclass(frozen=True)
class ActivationPlacement:
    """Where each rank's part of one activation lies in the whole.

    Args:
        dim: along which it is divided; None if each rank has the whole, to use for its part (copied to the region).
        packed: see :data:`PACKED`.
        length: of the whole, along ``dim``.
        is_positions: divided as in [Note: positions that are divided], with the length of the moment.
    """

    dim: int | None = None
    packed: int = 1
    length: int = 0
    is_positions: bool = False

    def whole(self, part: Tensor, mesh: DeviceMesh, num_positions: int) -> Tensor:
        """The whole, for what runs alike on every rank. Differentiable.

        Communication: forward one all-gather, backward none; nothing for what was copied.
        """
        if self.dim is None:  # its gradients are summed over the ranks, and those of its use here are alike on all
            return scaled_gradient(part, 1 / mesh.size())
        if self.is_positions:
            return gather(part, mesh, self.dim, num_positions)
        dim, piece, width = self.dim, self._piece, self._width(mesh)
        padded = _padded(part.unflatten(dim, (self.packed, -1)), dim + 1, width).flatten(dim, dim + 1)
        ranks = gather(padded, mesh, dim).unflatten(dim, (mesh.size(), self.packed, width))
        return ranks.transpose(dim, dim + 1).flatten(dim + 1, dim + 2).narrow(dim + 1, 0, piece).flatten(dim, dim + 1)

    def part(self, whole: Tensor, mesh: DeviceMesh) -> Tensor:
        """This rank's part of the whole, to go on with. Differentiable.

        Communication: backward one all-gather; for what is copied again, one all-reduce.
        """
        if self.dim is None:
            return copy_to_tensor_region(whole, mesh)
        if self.is_positions:
            return scatter_to_sequence_region(whole, mesh, self.dim)
        dim, width = self.dim, self._width(mesh)
        pieces = _padded(whole.unflatten(dim, (self.packed, self._piece)), dim + 1, mesh.size() * width)
        ranks = pieces.unflatten(dim + 1, (mesh.size(), width)).transpose(dim, dim + 1).flatten(dim, dim + 2)
        own = scatter(ranks, mesh, dim).unflatten(dim, (self.packed, width))
        return own.narrow(dim + 1, 0, self._present(mesh)).flatten(dim, dim + 1)

    def fits(self, part: Tensor, mesh: DeviceMesh) -> bool:
        """Whether a part is as long as one placed so."""
        if self.dim is None:
            return True
        return self.dim < part.ndim and (self.is_positions or part.shape[self.dim] == self.packed * self._present(mesh))

    def _present(self, mesh: DeviceMesh) -> int:
        return present(mesh.get_local_rank(), self._width(mesh), self._piece)

    @property
    def _piece(self) -> int:
        return self.length // self.packed

    def _width(self, mesh: DeviceMesh) -> int:
        return -(-self._piece // mesh.size())


def find_placements(
    pairs: list[tuple[Tensor, Tensor]], mesh: DeviceMesh, in_positions: bool
) -> list[ActivationPlacement | None]:
    """Where parts lie in their wholes; ``dim`` None for those that are whole, None for those that are nowhere in them.

    There are as many pairs, of whole and part, on every rank; ``in_positions``, they may be divided by positions too.

    Communication: one all-reduce of some numbers over ``mesh``.
    """
    candidates = [list(_candidates(whole, mesh, in_positions)) for whole, _ in pairs]
    device = pairs[0][0].device if pairs else torch.device(mesh.device_type)
    fits = [_is_close(part, own) for (_, part), found in zip(pairs, candidates, strict=True) for _, own in found]
    verdict = torch.tensor(fits, dtype=torch.int64, device=device)
    dist.all_reduce(verdict, dist.ReduceOp.MIN, mesh.get_group())
    agreed = iter(verdict.tolist())
    fitting = [[placement for placement, _ in found if next(agreed)] for found in candidates]
    return [placements[0] if placements else None for placements in fitting]


def _candidates(whole: Tensor, mesh: DeviceMesh, in_positions: bool) -> Iterator[tuple[ActivationPlacement, Tensor]]:
    yield ActivationPlacement(), whole
    for dim, length in reversed(list(enumerate(whole.shape))):
        if in_positions and dim == 1:
            positions = scatter_to_sequence_region(whole, mesh, dim)
            yield ActivationPlacement(dim, length=length, is_positions=True), positions
        for packed in PACKED:
            if length % packed == 0 and length // packed >= mesh.size():
                yield ActivationPlacement(dim, packed, length), shard_of(whole, shard_placement(dim, packed), mesh)


def _is_close(part: Tensor, own: Tensor) -> bool:
    if part.shape != own.shape or part.dtype != own.dtype:
        return False
    if not part.is_floating_point():
        return torch.equal(part, own)
    rounding, finite = rounding_of(own), own.isfinite()
    if not torch.equal(finite, part.isfinite()):
        return False
    part, own = part.float().where(finite, 0), own.float().where(finite, 0)
    return float((part - own).norm()) <= rounding * max(float(own.norm()), 1e-12)


def _padded(tensor: Tensor, dim: int, length: int) -> Tensor:
    return F.pad(tensor, [0, 0] * (tensor.ndim - 1 - dim) + [0, length - tensor.shape[dim]])
