"""The operators that need the whole vocabulary and get by with small messages, and those of autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dist.compat.torch import legacy_reduction
from lightning_dist.parallel.tensor.mappings import copy_to_tensor_region
from lightning_dist.parallel.tensor.vocab_parallel.cross_entropy import vocab_cross_entropy
from lightning_dist.parallel.tensor.vocab_parallel.split_tensor import VocabTensor
from lightning_dist.parallel.tensor.vocab_parallel.vocabulary import Vocabulary
from lightning_dist.pytree import tree_map_only


def _cross_entropy(
    logits: VocabTensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """``torch.nn.functional.cross_entropy``; NotImplemented for what it would refuse, or differentiates besides."""
    if not isinstance(logits, VocabTensor) or isinstance(target, VocabTensor):
        return NotImplemented
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    classes_dim = min(1, logits.ndim - 1)
    rows = list(logits.shape)
    del rows[classes_dim]
    probabilities = target.is_floating_point() and target.shape == logits.shape
    if (
        logits.vocab_dim != classes_dim
        or not (probabilities or (target.dtype in (torch.int64, torch.uint8) and list(target.shape) == rows))
        or (weight is not None and weight.shape != (logits.vocabulary.size,))
        or (target.requires_grad and torch.is_grad_enabled())
        or (probabilities and ignore_index >= 0)
        or reduction not in ("none", "mean", "sum")
        or not 0 <= label_smoothing <= 1
    ):
        return NotImplemented
    columns = logits.to_local().movedim(classes_dim, -1)
    if probabilities:
        target = target.movedim(classes_dim, -1).reshape(-1, logits.vocabulary.size)
    loss = vocab_cross_entropy(
        columns.reshape(math.prod(rows), logits.vocabulary.width),
        logits.vocabulary,
        target if probabilities else target.reshape(-1),
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    if not torch.is_autocast_enabled(columns.device.type):
        loss = loss.to(logits.dtype)
    return loss.reshape(rows) if reduction == "none" else loss


class _Largest(torch.autograd.Function):
    """The ``k`` largest of each row (..., own width): values and columns, (..., k) each, the largest first.

    For ``k`` = 1 it is the lowest column of equals, as torch's max. Backward gives the values' gradient to the ranks
    that hold them.

    Communication: forward one all-gather over the mesh, of at most 2 k numbers a row and rank; backward none.
    """

    @staticmethod
    def forward(ctx: Any, columns: Tensor, vocabulary: Vocabulary, k: int) -> tuple[Tensor, Tensor]:
        own = min(k, vocabulary.width)
        values, at = columns.max(-1, keepdim=True) if own == 1 else columns.topk(own)
        # float64 holds every float32 and every column exactly
        found = torch.stack([values.double(), (at + vocabulary.start).double()])
        found = vocabulary.gather(found, [min(k, width) for width in vocabulary.widths])
        if k == 1:
            order = found[0].argmax(-1, keepdim=True)  # the first of equals
        else:
            order = torch.sort(found[0], stable=True, descending=True)[1][..., :k]
        values, at = found[0].gather(-1, order), found[1].gather(-1, order).long()
        ctx.vocabulary = vocabulary
        ctx.save_for_backward(at)
        ctx.mark_non_differentiable(at)
        return values.to(columns.dtype), at

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (at,) = ctx.saved_tensors
        own, width = at - ctx.vocabulary.start, ctx.vocabulary.width
        own = own.where((own >= 0) & (own < width), width)  # what others hold goes to a column that is cut off
        grad = grad_values.new_zeros(*at.shape[:-1], width + 1)
        grad = grad.scatter_add(-1, own, copy_to_tensor_region(grad_values, ctx.vocabulary.mesh))
        return grad[..., :-1], None, None


def _largest(logits: VocabTensor, dim: int, k: int, columns: Tensor) -> tuple[Tensor, Tensor] | None:
    if not isinstance(dim, int) or dim % logits.ndim != logits.vocab_dim:
        return None
    values, at = _Largest.apply(columns.movedim(logits.vocab_dim, -1), logits.vocabulary, k)
    return values.movedim(-1, logits.vocab_dim), at.movedim(-1, logits.vocab_dim)


def _argmax(logits: VocabTensor, dim: int | None = None, keepdim: bool = False) -> Any:
    found = None if dim is None else _largest(logits, dim, 1, logits.to_local().detach())
    if found is None:
        return NotImplemented
    return found[1] if keepdim else found[1].squeeze(logits.vocab_dim)


def _max(logits: VocabTensor, dim: Any, keepdim: bool = False) -> Any:
    found = _largest(logits, dim, 1, logits.to_local())
    if found is None:
        return NotImplemented
    return torch.return_types.max(found if keepdim else [part.squeeze(logits.vocab_dim) for part in found])  # type: ignore[arg-type]


def _topk(logits: VocabTensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if not largest or not 0 < k <= logits.vocabulary.size:
        return NotImplemented
    found = _largest(logits, dim, k, logits.to_local())
    return NotImplemented if found is None else torch.return_types.topk(found)


def _grad(logits: VocabTensor, *_: Any) -> VocabTensor | None:
    grad = logits.to_local().grad
    return None if grad is None else logits.wrap(grad, logits.vocabulary, logits.vocab_dim)


def _register_hook(logits: VocabTensor, hook: Callable[[Tensor], Tensor | None]) -> Any:
    def on_columns(grad: Tensor) -> Tensor | None:
        changed = hook(logits.wrap(grad, logits.vocabulary, logits.vocab_dim))
        if changed is None or isinstance(changed, VocabTensor):
            return changed and changed.to_local()
        return logits.vocabulary.own(changed, logits.vocab_dim)

    return logits.to_local().register_hook(on_columns)


def _autograd_grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    grads = torch.autograd.grad(outputs, tree_map_only(VocabTensor, VocabTensor.to_local, inputs), *args, **kwargs)
    return tuple(
        wrt.wrap(grad, wrt.vocabulary, wrt.vocab_dim) if isinstance(wrt, VocabTensor) and grad is not None else grad
        for wrt, grad in zip(inputs, grads, strict=True)
    )


OPERATORS: dict[Any, Callable[..., Any]] = {
    Tensor.grad.__get__: _grad,  # type: ignore[union-attr]
    Tensor.retain_grad: lambda logits: logits.to_local().retain_grad(),
    Tensor.register_hook: _register_hook,
    torch.autograd.grad: _autograd_grad,
    F.cross_entropy: _cross_entropy,
    **dict.fromkeys((torch.argmax, Tensor.argmax), _argmax),
    **dict.fromkeys((torch.max, Tensor.max), _max),
    **dict.fromkeys((torch.topk, Tensor.topk), _topk),
}
