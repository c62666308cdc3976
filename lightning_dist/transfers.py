"""Numbers between the host and the device, for which the host does not wait while the device computes.

[Note: the host runs ahead]
The host hands the device its work and goes on. Where it reads a number of a tensor, or copies from memory that is not
pinned, it waits until the device has done all that it was given, and the device then waits for the host. So a step
reads nothing that it can do without: what only confirms that all is well is read a step later, when the device has
work of the step between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers in a new tensor on the device, by a copy from pinned memory."""
    on_host = torch.tensor(numbers, dtype=dtype, pin_memory=device.type != "cpu")
    return on_host.to(device, non_blocking=True)


class LateRead:
    """A tensor's values as they are now, to be read later; the copy begins behind what the device was given."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=True, copy=True)  # in pinned memory
        self._event = None if tensor.device.type == "cpu" else torch.accelerator.current_stream().record_event()

    def tolist(self) -> list[int]:
        """The values; waits for the copy, and for nothing that the device was given after it."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy.tolist()
