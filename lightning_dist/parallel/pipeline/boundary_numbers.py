"""Numbers that modules return or keep beside tensors: they go over a cut with the activations.

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

from lightning_dist.parallel.pipeline.plain_values import number_kind
from lightning_dist.parallel.pipeline.split_points import BoundaryTensor, SplitPoint, skipped_indices
from lightning_dist.parallel.pipeline.trace import Trace
from lightning_dist.placeholder import placeholder
from lightning_dist.pytree import deep_leaves


@dataclass(frozen=True)
class NumberSlot:
    """A number that is sent.

    Args:
        name: of the module.
        key: which of its calls returned it, from 0; or the attribute that it is.
        place: among the leaves of what the call returned; -1 for an attribute.
        kind: its type.
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
    """What is sent.

    Raises:
        RuntimeError: something else is there now than when the step was traced.
    """
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
    values: dict[NumberSlot, Any] = {}
    for slot, bits in zip(slots, received.tolist(), strict=True):
        values[slot] = struct.unpack("<d", struct.pack("<q", bits))[0] if slot.kind is float else slot.kind(bits)
    return values
