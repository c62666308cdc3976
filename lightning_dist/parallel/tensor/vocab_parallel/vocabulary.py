"""Which columns of a vocabulary each rank holds, what the ranks say to each other about them, and the embedding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

from lightning_dist.parallel.tensor.mappings import reduce_from_tensor_region


@dataclass(frozen=True)
class Vocabulary:
    """``size`` columns over a 1-D mesh by torch's chunk rule: ceil(size / ranks) each, the last ranks fewer or none."""

    mesh: DeviceMesh
    size: int

    def __post_init__(self) -> None:
        if self.mesh.ndim != 1:
            raise ValueError(f"a vocabulary is split over one axis; this mesh has {self.mesh.ndim}: pass mesh['tp']")

    @cached_property
    def widths(self) -> list[int]:
        """The number of columns of each rank."""
        chunk = -(-self.size // self.mesh.size())
        return [min(chunk, max(0, self.size - rank * chunk)) for rank in range(self.mesh.size())]

    @cached_property
    def width(self) -> int:
        """The number of this rank's columns."""
        return self.widths[self.mesh.get_local_rank()]

    @cached_property
    def start(self) -> int:
        """The first of this rank's columns."""
        return sum(self.widths[: self.mesh.get_local_rank()])

    def own(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """This rank's columns of a whole tensor: a view."""
        return tensor.narrow(dim, self.start, self.width)

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduces in place. Communication: one all-reduce of the tensor over the mesh."""
        dist.all_reduce(tensor, op, self.mesh.get_group())
        return tensor

    def gather(self, columns: Tensor, widths: list[int], dim: int = -1) -> Tensor:
        """All ranks' columns beside each other; ``widths`` says how many each rank brings.

        Communication: one all-gather over the mesh, of the widest rank's columns.
        """
        widest = max(widths)
        sent = columns.movedim(dim, 0).contiguous()
        if len(sent) < widest:
            sent = torch.cat([sent, sent.new_zeros(widest - len(sent), *sent.shape[1:])])
        received = sent.new_empty(len(widths), *sent.shape)
        dist.all_gather_into_tensor(received.flatten(0, 1), sent, self.mesh.get_group())
        rows = [part[:width].movedim(0, dim) for part, width in zip(received, widths, strict=True)]
        return torch.cat(rows, dim)


class LocalRows(TorchFunctionMode):
    """While it lasts, ``F.embedding`` looks up this rank's rows and sums the ranks' outputs.

    Args:
        vocabulary: which rows are whose.
        weight: this rank's, (own rows, width), as the forward sees it.

    Communication: forward one all-reduce of the output's bytes over the axis; backward none.
    """

    def __init__(self, vocabulary: Vocabulary, weight: Tensor) -> None:
        super().__init__()
        self.vocabulary, self.weight = vocabulary, weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding and args[1] is self.weight:
            return self._look_up(args[0], args[2] if len(args) > 2 else (kwargs or {}).get("padding_idx"))
        return func(*args, **(kwargs or {}))

    def _look_up(self, ids: Tensor, padding: int | None) -> Tensor:
        own = ids - self.vocabulary.start
        is_mine = (own >= 0) & (own < self.vocabulary.width)
        if padding is not None:  # its row has no gradient
            padding = padding - self.vocabulary.start
            padding = padding if 0 <= padding < self.vocabulary.width else None
        weight = self.weight
        if not len(weight):  # a rank that came too late for a row
            weight = torch.cat([weight, weight.new_zeros(1, weight.shape[1])])
        found = F.embedding(own.where(is_mine, 0), weight, padding)
        return reduce_from_tensor_region(found.masked_fill(~is_mine.unsqueeze(-1), 0.0), self.vocabulary.mesh)
