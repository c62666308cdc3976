"""The whole of a divided tensor: differentiable, numbers of it, and views whose writes reach this rank's part.

[Note: views of a whole]
``p.view(-1)[i] = 0`` or ``tensor.view_as(q).copy_(q)`` (which torch's own ``orthogonal_`` does) write through a view. A
view of a divided tensor is a view of the whole, gathered for it. It remembers where it came from: after each function
of torch that changed the whole (its version counter moved) this rank's part is copied back, and before each that comes
after a change of the part the whole is gathered again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from lightning_dist.compat.torch import DisableTorchFunctionSubclass, version_of
from lightning_dist.divided.functions import Way, way_of, writes
from lightning_dist.divided.readers import agree_to_read
from lightning_dist.dtensors import as_dtensor, data_groups, from_first_data_rank, full, local_part, part_of, place_like
from lightning_dist.pytree import tree_leaves, tree_map


def whole(tensor: DTensor) -> Tensor:
    """The whole tensor, plain, on every rank; a gradient that comes back is averaged over the data ranks.

    Communication: that of :func:`~lightning_dist.dtensors.full`; backward, one all-reduce of the whole
    tensor's bytes per data axis of its mesh. The ranks of a tensor axis have the same gradient.

    Raises:
        RuntimeError: only one rank runs the code that asks for it.
    """
    agree_to_read(tensor)
    if torch.is_grad_enabled() and tensor.requires_grad:
        return _Whole.apply(tensor)
    return full(tensor)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> Tensor:
        ctx.like = tensor.detach()
        return full(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return place_like(_mean_over_data(gradient, ctx.like), ctx.like)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> Tensor:
        ctx.like = tensor.detach()
        return reduce_parts(local_part(tensor).sum(), tensor, dist.ReduceOp.SUM)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        value = _mean_over_data(gradient, ctx.like)
        local = local_part(ctx.like)
        return as_dtensor(value.to(local.dtype).expand(local.shape).contiguous(), ctx.like)


def _mean_over_data(gradient: Tensor, like: DTensor) -> Tensor:
    gradient = gradient.contiguous().clone()
    for group in data_groups(like):
        dist.all_reduce(gradient, group=group)
        gradient /= dist.get_world_size(group)
    return gradient


def reduce_parts(number: Tensor, like: DTensor, op: Any) -> Tensor:
    """What the ranks that hold different parts have, reduced in place. Communication: an all-reduce of it per axis."""
    agree_to_read(like)
    for axis, placement in enumerate(like.placements):
        if not placement.is_replicate() and like.device_mesh.size(axis) > 1:
            dist.all_reduce(number, op, like.device_mesh.get_group(axis))
    return number


def sum_of(tensor: DTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The sum of all elements of the whole. Communication: one all-reduce of a number per axis that divides."""
    if torch.is_grad_enabled() and tensor.requires_grad and dtype is None:
        return _Sum.apply(tensor)
    return reduce_parts(local_part(tensor).sum(dtype=dtype), tensor, dist.ReduceOp.SUM)


def norms_of(tensors: list[Tensor], p: float) -> list[Tensor]:
    """The p-norm of each, of the whole where it is divided; p above 0, no gradient.

    Communication: one all-reduce of a float64 per tensor for each set of axes that divide, together.
    """
    locals_ = list(map(local_part, tensors))
    norms = [_norm(local, p) for local in locals_]
    divided: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            divided.setdefault((tensor.device_mesh, tensor.placements, tensor.device), []).append(index)
    for indices in divided.values():
        first: Any = tensors[indices[0]]
        together = torch.stack([norms[i] for i in indices])
        if math.isinf(p):
            together = reduce_parts(together, first, dist.ReduceOp.MAX)
        else:
            together = reduce_parts(together**p, first, dist.ReduceOp.SUM) ** (1 / p)
        for index, norm in zip(indices, together, strict=True):
            norms[index] = norm
    return [norm.to(_real(local.dtype)) for norm, local in zip(norms, locals_, strict=True)]


def _norm(local: Tensor, p: float) -> Tensor:
    """In float64; parts of 16 bits are summed in float32, or their rounding would show."""
    wide = torch.float32 if local.device.type == "mps" else torch.float64
    if not local.numel():
        return torch.zeros((), dtype=wide, device=local.device)
    local = local.abs() if local.is_complex() else local
    return torch.linalg.vector_norm(local, p, dtype=max(local.dtype, torch.float32, key=lambda d: d.itemsize)).to(wide)


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


class _Source:
    """The whole of a divided tensor, for views of it; ``divided`` is None for what only draws alike on all ranks."""

    def __init__(self, base: Tensor, divided: DTensor | None, like: DTensor) -> None:
        self.base, self.divided, self.like = base, divided, like
        self._note()

    def gather_again(self) -> None:
        if self.divided is not None and _version(local_part(self.divided)) != self._seen[1]:
            with torch.no_grad():
                self.base.copy_(full(self.divided))
            self._note()

    def write_back(self) -> None:
        if self.divided is None or _version(self.base) == self._seen[0] != -1:
            return
        with torch.no_grad():
            local_part(self.divided).copy_(part_of(self.base, self.divided))
        self._note()

    def _note(self) -> None:
        self._seen = _version(self.base), 0 if self.divided is None else _version(local_part(self.divided))


class WholeView(Tensor):
    """See [Note: views of a whole]."""

    _source: _Source

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # first the divided ones are gathered
        kwargs = kwargs or {}
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, WholeView)]
        sources = {id(leaf._source): leaf._source for leaf in leaves}
        with DisableTorchFunctionSubclass():
            for source in sources.values():
                source.gather_again()
            result = func(*args, **kwargs)
            if way_of(func) is Way.DRAW and writes(func):
                from_first_data_rank(leaves[0].as_subclass(Tensor), leaves[0]._source.like)
            for source in sources.values():
                source.write_back()
            return tree_map(lambda leaf: _marked(leaf, list(sources.values())), result)


def _marked(leaf: Any, sources: list[_Source]) -> Any:
    """A result that shares the memory of a whole is a view of it too."""
    if not isinstance(leaf, Tensor):
        return leaf
    for source in sources:
        if leaf.untyped_storage().data_ptr() == source.base.untyped_storage().data_ptr():
            if isinstance(leaf, WholeView):
                return leaf
            view = leaf.as_subclass(WholeView)
            view._source = source
            return view
    return leaf.as_subclass(Tensor) if isinstance(leaf, WholeView) else leaf


def view_of_whole(divided: DTensor, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``func``, which makes views, on the whole. Communication: gathers it."""
    base = whole(divided)
    source = _Source(base, divided, divided)
    return tree_map(lambda leaf: _marked(leaf, [source]), func(base, *args, **kwargs))


def shared_draws(created: Tensor, like: DTensor) -> Tensor:
    """A new tensor into which all data ranks draw the same random numbers; see [Note: views of a whole]."""
    return _marked(created, [_Source(created, None, like)])


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else version_of(tensor)
