"""Cross-entropy of logits that are split by vocabulary, without gathering them (Megatron-LM, arXiv 1909.08053)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dist.compat.torch import assert_async
from lightning_dist.parallel.tensor.mappings import copy_to_tensor_region
from lightning_dist.parallel.tensor.vocab_parallel.vocabulary import Vocabulary


def vocab_cross_entropy(
    columns: Tensor,
    vocabulary: Vocabulary,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``torch.nn.functional.cross_entropy`` of (N, V) logits of which each rank holds some columns.

    Args:
        columns: (N, own width), this rank's.
        vocabulary: of V columns.
        target: (N,) classes, or (N, V) probabilities of all columns; equal on all ranks.
        weight: (V,), or None.
        ignore_index: a class that counts nothing.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1].

    Returns:
        A scalar, or (N,) for "none", equal on all ranks; at least float32. Its backward gives ``columns`` their
        own gradient, which may be differentiated again.

    Raises:
        IndexError: a class outside of the vocabulary (on an accelerator: a device-side assertion, as torch's).

    Communication: forward two all-reduces over the mesh, of N and of 2 N numbers; backward none.
    Memory: backward keeps ``columns`` and per-row numbers; a temporary of the columns' shape each way.
    """
    with torch.autocast(columns.device.type, enabled=False):
        dtype = torch.promote_types(columns.dtype, torch.float32)
        if weight is not None:
            weight = weight.detach().to(dtype)
        targets: _Classes | _Probabilities
        if target.is_floating_point():
            targets = _Probabilities(target.detach(), vocabulary, weight, label_smoothing, dtype)
        else:
            targets = _Classes(target, vocabulary, weight, ignore_index, label_smoothing, dtype)
        losses = _Losses.apply(columns, targets, vocabulary)
        if reduction == "mean":
            return losses.sum() / targets.count
        return losses if reduction == "none" else losses.sum()


class _Classes:
    """Each row's distribution q over the columns, from a class: (1 - s) w[class] there and s / V w everywhere."""

    def __init__(
        self,
        target: Tensor,
        vocabulary: Vocabulary,
        weight: Tensor | None,
        ignore_index: int,
        smoothing: float,
        dtype: torch.dtype,
    ) -> None:
        kept = target != ignore_index
        _check_range(target, kept, vocabulary.size)
        classes = target.long().where(kept, 0)
        at = classes - vocabulary.start
        self.mine = kept & (at >= 0) & (at < vocabulary.width)
        self.at = at.where(self.mine, 0)[:, None]
        counted = kept.to(dtype) if weight is None else kept.to(dtype) * weight[classes]
        self.count = counted.sum()
        self.on_class = self.mass = (1 - smoothing) * counted
        self.everywhere: Tensor | None = None
        self.column_weight = None if weight is None else vocabulary.own(weight)
        if smoothing:
            self.everywhere = smoothing / vocabulary.size * kept.to(dtype)
            self.mass = self.mass + self.everywhere * (vocabulary.size if weight is None else weight.sum())
        self.kept: Tensor | None = kept

    def overlap(self, columns: Tensor) -> Tensor:
        """(N,): the sum of q x over this rank's columns."""
        if not columns.shape[1]:
            return columns.new_zeros(len(columns))
        total = (self.on_class * columns.gather(1, self.at)[:, 0]).where(self.mine, 0)
        if self.everywhere is not None:
            row = columns.sum(1) if self.column_weight is None else columns.mv(self.column_weight)
            total = total + self.everywhere * row
        return total

    def subtract_from(self, grad: Tensor) -> None:
        """Takes q from (N, own width), in place."""
        if not grad.shape[1]:
            return
        grad.scatter_add_(1, self.at, (-self.on_class).where(self.mine, 0)[:, None])
        if self.everywhere is not None and self.column_weight is not None:
            grad.addr_(self.everywhere, self.column_weight, alpha=-1)
        elif self.everywhere is not None:
            grad.sub_(self.everywhere[:, None])


class _Probabilities:
    """The same from probabilities: ((1 - s) p + s / V) w."""

    kept = None

    def __init__(
        self, target: Tensor, vocabulary: Vocabulary, weight: Tensor | None, smoothing: float, dtype: torch.dtype
    ) -> None:
        total = target.sum(1, dtype=dtype) if weight is None else target.to(dtype).mv(weight)
        whole = vocabulary.size if weight is None else weight.sum()
        self.mass = (1 - smoothing) * total + smoothing / vocabulary.size * whole
        self.count = len(target)
        self.distribution = (1 - smoothing) * vocabulary.own(target).to(dtype) + smoothing / vocabulary.size
        if weight is not None:
            self.distribution *= vocabulary.own(weight)

    def overlap(self, columns: Tensor) -> Tensor:
        return (self.distribution * columns).sum(1)

    def subtract_from(self, grad: Tensor) -> None:
        grad.sub_(self.distribution)


def _check_range(target: Tensor, kept: Tensor, size: int) -> None:
    outside = kept & ((target < 0) | (target >= size))
    if outside.device.type == "cpu":
        if outside.any():
            raise IndexError(f"Target {target[outside][0].item()} is out of bounds.")
    elif outside.device.type != "meta":
        assert_async(~outside.any(), "cross_entropy: a target is out of bounds")


class _Losses(torch.autograd.Function):
    """(N,) losses: mass x log-sum-exp - overlap."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, targets: _Classes | _Probabilities, vocabulary: Vocabulary) -> Tensor:
        dtype = targets.mass.dtype
        own = columns if vocabulary.width else columns.new_full((len(columns), 1), -math.inf)
        top = own.amax(1).to(dtype)
        vocabulary.all_reduce(top, dist.ReduceOp.MAX)
        shifted = columns - top[:, None]
        overlap = targets.overlap(shifted)
        exponentials, overlap = vocabulary.all_reduce(torch.stack([shifted.exp_().sum(1), overlap]))
        normalizer = exponentials.log()
        ctx.save_for_backward(columns, top + normalizer)
        ctx.targets, ctx.vocabulary = targets, vocabulary
        losses = targets.mass * normalizer - overlap
        return losses if targets.kept is None else losses.where(targets.kept, 0)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None]:
        columns, normalizer = ctx.saved_tensors
        targets = ctx.targets
        if torch.is_grad_enabled():  # create_graph=True
            copied = copy_to_tensor_region(grad_losses, ctx.vocabulary.mesh)[:, None]
            softmax = _softmax(columns, normalizer, ctx.vocabulary)
            distribution = torch.zeros_like(softmax)
            targets.subtract_from(distribution)  # minus q, which depends on no column
            return ((softmax * targets.mass[:, None] + distribution) * copied).to(columns.dtype), None, None
        grad = (columns - normalizer[:, None]).exp_()
        grad.mul_(targets.mass[:, None])
        targets.subtract_from(grad)
        grad.mul_(grad_losses[:, None])
        return grad.to(columns.dtype), None, None


def _softmax(columns: Tensor, normalizer: Tensor, vocabulary: Vocabulary) -> Tensor:
    """This rank's columns of the softmax, differentiable. Communication: backward one all-reduce of N numbers."""
    copied = copy_to_tensor_region(_Normalizer.apply(columns, normalizer, vocabulary), vocabulary.mesh)
    return (columns - copied[:, None]).exp()


class _Normalizer(torch.autograd.Function):
    """(N,) log-sum-exp of all columns, whose value is known already; only its gradient is computed."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, normalizer: Tensor, vocabulary: Vocabulary) -> Tensor:
        ctx.save_for_backward(columns, normalizer)
        ctx.vocabulary = vocabulary
        return normalizer.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        columns, normalizer = ctx.saved_tensors
        softmax = _softmax(columns, normalizer, ctx.vocabulary)
        return (softmax * copy_to_tensor_region(gradient, ctx.vocabulary.mesh)[:, None]).to(columns.dtype), None, None
