"""What is sent from stage to stage: each boundary tensor as a flat one, of one size for all microbatches of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_dist.parallel.pipeline.split_points import BoundaryTensor, SplitPoint


@dataclass(frozen=True)
class P2PTensors:
    """The tensors that cross a cut, as they are sent.

    torch's stages receive every microbatch into buffers of one shape, and ask for gradients of all of them. So each
    tensor travels flat, filled up with zeros to the largest microbatch's (a copy only where it is smaller), and what
    is not floating point travels as the bits of float32.

    Args:
        sizes: elements of each flat tensor.
        dtypes: of each flat tensor.
    """

    sizes: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, points: Sequence[SplitPoint]) -> P2PTensors:
        """Those of a cut.

        Args:
            points: the cut, as traced for each shape of microbatch.
        """
        flat = [[_flat_size(c.tensor) for c in point.boundary] for point in points]
        return cls(
            tuple(max(sizes) for sizes in zip(*flat, strict=True)),
            tuple(_flat_dtype(c.tensor) for c in points[0].boundary),
        )

    def examples(self, device: torch.device, requires_grad: bool) -> tuple[Tensor, ...]:
        """Tensors like those that travel, as torch's stages want to know them."""
        return tuple(
            torch.empty(size, dtype=dtype, device=device, requires_grad=requires_grad)
            for size, dtype in zip(self.sizes, self.dtypes, strict=True)
        )

    def unpack(self, point: SplitPoint, flat: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor]:
        """The tensors of a microbatch, and a link to give :meth:`pack`, by which each of ``flat`` gets a gradient."""
        *found, link = _Received.apply(point.boundary, *flat)
        return found, link

    def pack(self, link: Tensor, sent: list[Tensor]) -> tuple[Tensor, ...]:
        """The flat tensors of a microbatch."""
        return _Sent.apply(self.sizes, link, *sent)


def first_link(device: torch.device) -> Tensor:
    """The link of a stage that receives nothing: what it sends asks for gradients also where its part is frozen."""
    return torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())


def ended(link: Tensor, loss: Tensor) -> Tensor:
    """The loss of a microbatch, of one element, tied to what its stage received."""
    return _Ended.apply(link, loss)


class _Received(torch.autograd.Function):
    """From flat tensors to those of a microbatch, without a copy where nothing is changed in place later."""

    @staticmethod
    def forward(ctx: Any, boundary: tuple[BoundaryTensor, ...], *flat: Tensor) -> Any:
        ctx.flat = [(tensor.shape, tensor.dtype, tensor.device) for tensor in flat]
        found = []
        for item, tensor in zip(boundary, flat, strict=True):
            value = _unflattened(tensor, item.tensor)
            if not item.tensor.is_floating_point():
                ctx.mark_non_differentiable(value)
            # autograd lets nobody change a view in place that a function of ours made
            found.append(value.clone() if item.changed else value)
        return (*found, flat[0].new_zeros((), dtype=torch.float32))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        flat = []
        for (shape, dtype, device), gradient in zip(ctx.flat, gradients, strict=False):
            if gradient is None or gradient.dtype != dtype:
                flat.append(torch.zeros(shape, dtype=dtype, device=device))
            else:
                flat.append(_flattened(gradient, shape.numel()))
        return None, *flat


class _Sent(torch.autograd.Function):
    """From the tensors of a microbatch to flat ones."""

    @staticmethod
    def forward(ctx: Any, sizes: tuple[int, ...], link: Tensor, *sent: Tensor) -> Any:
        ctx.link = link.dtype, link.device
        ctx.sent = [(tensor.shape, tensor.is_floating_point()) for tensor in sent]
        return tuple(_flattened(_bits(t), size) for t, size in zip(sent, sizes, strict=True))

    @staticmethod
    def backward(ctx: Any, *flat: Tensor) -> Any:
        gradients = [
            gradient[: shape.numel()].view(shape) if is_floating else None
            for gradient, (shape, is_floating) in zip(flat, ctx.sent, strict=True)
        ]
        dtype, device = ctx.link
        return None, torch.zeros((), dtype=dtype, device=device), *gradients


class _Ended(torch.autograd.Function):
    """The loss of a microbatch, which asks for gradients of what was received also where it does not depend on it."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, loss: Tensor) -> Tensor:
        return loss.reshape(1).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return torch.zeros((), dtype=torch.float32, device=gradient.device), gradient.reshape(())


def _flat_dtype(tensor: Tensor) -> torch.dtype:
    return tensor.dtype if tensor.is_floating_point() else torch.float32


def _flat_size(tensor: Tensor) -> int:
    if tensor.is_floating_point():
        return max(tensor.numel(), 1)
    return max(-(-tensor.numel() * tensor.element_size() // 4), 1)


def _bits(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return tensor
    size = tensor.numel() * tensor.element_size()
    return functional.pad(tensor.contiguous().reshape(-1).view(torch.uint8), (0, -size % 4)).view(torch.float32)


def _flattened(tensor: Tensor, size: int) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return _unviewed(flat) if flat.numel() == size else functional.pad(flat, (0, size - flat.numel()))


def _unviewed(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that autograd does not take for a view: schedules detach those in place."""
    return tensor.new_empty(0).set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def _unflattened(flat: Tensor, like: Tensor) -> Tensor:
    if like.is_floating_point():
        return flat[: like.numel()].view(like.shape)
    count = like.numel() * like.element_size()
    return flat.detach().view(torch.uint8)[:count].clone().view(like.dtype).view(like.shape)
