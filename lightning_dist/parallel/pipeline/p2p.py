"""What is sent from stage to stage: each boundary tensor as a flat one, and the numbers beside them.

[Note: numbers over a cut]
A later stage does not run the modules of earlier ones; it takes what the trace recorded of them, with what was received
in place of the tensors. Numbers among it (``return h, int(mask.sum())``, a flag, lengths) and those that modules keep
in attributes are those of one batch. So each stage sends, after its tensors, the numbers of all calls that the next
stages skip: as int64, floats by their bits, in one tensor more, and only where there are any.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_dist.parallel.pipeline.split_points import BoundaryTensor, SplitPoint, skipped_indices
from lightning_dist.parallel.pipeline.trace import Trace, number_kind
from lightning_dist.placeholder import placeholder
from lightning_dist.pytree import deep_leaves

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class NumberSlot:
    """A number that is sent: what a module's call of number ``key`` returned, at a place among its leaves; or, at place
    -1, the module's attribute of that name.
    """

    name: str
    key: int | str
    place: int
    kind: type


def with_numbers(trace: Trace, point: SplitPoint) -> SplitPoint:
    """The cut with the numbers that are sent over it, as one more boundary tensor."""
    slots: list[NumberSlot] = []
    for index in sorted({*skipped_indices(trace, point.call), point.call}):
        call = trace.calls[index]
        found = enumerate(deep_leaves(call.output))
        slots += [NumberSlot(call.name, call.ordinal, at, kind) for at, leaf in found if (kind := number_kind(leaf))]
    written = trace.attributes.items()
    slots += [NumberSlot(name, key, -1, kind) for (name, key), (op, kind) in written if op <= point.after]
    if not slots:
        return point
    item = BoundaryTensor(placeholder(torch.zeros(len(slots), dtype=torch.int64)), -1, -1, False)
    return replace(point, boundary=(*point.boundary, item), numbers=tuple(slots))


def encoded(slots: Sequence[NumberSlot], values: dict[NumberSlot, Any], device: torch.device) -> Tensor:
    """What is sent; raises a RuntimeError where something else is there now than when the step was traced."""
    bits = []
    for slot in slots:
        value = values.get(slot)
        if slot.kind is float and type(value) is int:
            value = float(value)
        if number_kind(value) is not slot.kind:
            what = f"attribute {slot.key}" if slot.place < 0 else "what it returns"
            raise RuntimeError(
                f"pp: {slot.name!r}, {what}: a {type(value).__name__} where the first batch of this shape had a "
                f"{slot.kind.__name__}, which later stages expect; name pipeline_cuts before that module"
            )
        bits.append(struct.unpack("<q", struct.pack("<d", value))[0] if slot.kind is float else int(value or 0))
    return torch.tensor(bits, dtype=torch.int64).to(device)


def decoded(slots: Sequence[NumberSlot], received: Tensor) -> dict[NumberSlot, Any]:
    """What was sent. On an accelerator the host waits for it."""
    return {
        slot: struct.unpack("<d", struct.pack("<q", bits))[0] if slot.kind is float else slot.kind(bits)
        for slot, bits in zip(slots, received.tolist(), strict=True)
    }


@dataclass(frozen=True)
class P2PTensors:
    """The tensors that cross a cut, as they are sent: the elements and the dtype of each.

    torch's stages receive every microbatch into buffers of one shape, and ask for gradients of all of them. So each
    tensor travels flat, filled up with zeros to the largest microbatch's (a copy only where it is smaller), and what
    is not floating point travels as the bits of float32.
    """

    sizes: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, points: Sequence[SplitPoint]) -> P2PTensors:
        """Those of a cut, as it was traced for each shape of microbatch."""
        sizes = zip(*([_flat_size(item.tensor) for item in point.boundary] for point in points), strict=True)
        first = [item.tensor for item in points[0].boundary]
        return cls(tuple(map(max, sizes)), tuple(t.dtype if t.is_floating_point() else torch.float32 for t in first))

    def examples(self, device: torch.device, requires_grad: bool) -> Tensors:
        """Tensors like those that travel, as torch's stages want to know them."""
        return tuple(
            torch.empty(size, dtype=dtype, device=device, requires_grad=requires_grad)
            for size, dtype in zip(self.sizes, self.dtypes, strict=True)
        )

    def unpack(self, point: SplitPoint, flat: Tensors) -> tuple[list[Tensor], Tensor]:
        """The tensors of a microbatch, and a link to give :meth:`pack`, by which each of ``flat`` gets a gradient."""
        *found, link = _Received.apply(point.boundary, *flat)
        return found, link

    def pack(self, link: Tensor, sent: list[Tensor]) -> Tensors:
        """The flat tensors of a microbatch."""
        return _Sent.apply(self.sizes, link, *sent)


def first_link(device: torch.device) -> Tensor:
    """The link of a stage that receives nothing: what it sends asks for gradients also where its part is frozen."""
    return torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())


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
        return None, *(
            torch.zeros(shape, dtype=dtype, device=device)
            if gradient is None or gradient.dtype != dtype
            else _flattened(gradient, shape.numel())
            for (shape, dtype, device), gradient in zip(ctx.flat, gradients, strict=False)
        )


class _Sent(torch.autograd.Function):
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


class Ended(torch.autograd.Function):
    """The loss of a microbatch, of one element, which asks for gradients of what its stage received (by the link) also
    where it does not depend on it.
    """

    @staticmethod
    def forward(ctx: Any, link: Tensor, loss: Tensor) -> Tensor:
        return loss.reshape(1).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return torch.zeros((), dtype=torch.float32, device=gradient.device), gradient.reshape(())


def _flat_size(tensor: Tensor) -> int:
    return max(tensor.numel() if tensor.is_floating_point() else -(-tensor.nbytes // 4), 1)


def _bits(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return tensor
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return functional.pad(flat, (0, -flat.numel() % 4)).view(torch.float32)


def _flattened(tensor: Tensor, size: int) -> Tensor:
    flat = tensor.detach().reshape(-1)
    if flat.numel() != size:
        return functional.pad(flat, (0, size - flat.numel()))
    # the same memory, but no view for autograd: schedules detach in place what they send
    return flat.new_empty(0).set_(flat.untyped_storage(), flat.storage_offset(), flat.size(), flat.stride())


def _unflattened(flat: Tensor, like: Tensor) -> Tensor:
    if like.is_floating_point():
        return flat[: like.numel()].view(like.shape)
    return flat.detach().view(torch.uint8)[: like.nbytes].clone().view(like.dtype).view(like.shape)
