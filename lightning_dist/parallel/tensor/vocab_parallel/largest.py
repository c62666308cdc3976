"""The largest of columns that are split by vocabulary, from each rank's largest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_dist.parallel.tensor.mappings import copy_to_tensor_region
from lightning_dist.parallel.tensor.vocab_parallel.vocabulary import Vocabulary


class Largest(torch.autograd.Function):
    """The ``k`` largest of each row (..., own width): values and columns, (..., k) each, the largest first.

    For ``k`` = 1 it is the lowest column of equals, as torch's max. Backward gives the values' gradient to the ranks
    that hold them.

    Communication: forward one all-gather over the mesh, of at most 2 k numbers a row and rank; backward none.
    """

    @staticmethod
    def forward(ctx: Any, columns: Tensor, vocabulary: Vocabulary, k: int) -> tuple[Tensor, Tensor]:
        own = min(k, vocabulary.width)
        if own == 1:
            values, at = columns.max(-1, keepdim=True)
        else:
            values, at = columns.topk(own)
        # float64 holds every float32 and every column exactly
        found = torch.stack([values.double(), (at + vocabulary.start).double()])
        found = vocabulary.gather(found, [min(k, width) for width in vocabulary.widths])
        if k == 1:
            order = found[0].argmax(-1, keepdim=True)  # the first of equals
        else:
            order = torch.sort(found[0], stable=True, descending=True)[1][..., :k]
        values, at = (part.gather(-1, order) for part in found.unbind())
        at = at.long()
        ctx.vocabulary = vocabulary
        ctx.save_for_backward(at)
        ctx.mark_non_differentiable(at)
        return values.to(columns.dtype), at

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (at,) = ctx.saved_tensors
        own = at - ctx.vocabulary.start
        mine = (own >= 0) & (own < ctx.vocabulary.width)
        grad = grad_values.new_zeros(*at.shape[:-1], ctx.vocabulary.width + 1)
        grad = grad.scatter_add(
            -1, own.where(mine, ctx.vocabulary.width), copy_to_tensor_region(grad_values, ctx.vocabulary.mesh)
        )
        return grad[..., :-1], None, None
