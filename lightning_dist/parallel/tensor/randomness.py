"""Random numbers on the tensor axis: alike where tensors are replicated, different where they are split.

The ranks of a data rank share their stream. Inside a region each takes one of its own, seeded from the shared one, so
that dropout on this rank's heads or columns differs from the others'; the shared stream goes on by one draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import DeviceMesh

from lightning_dist.randomness import seed_torch

_outer: list[_Stream] = []
"""The streams that were left for one of a rank's own, outermost first."""


class _Stream:
    """The state of torch's generators: the CPU's, and the device's."""

    def __init__(self, device_type: str) -> None:
        self._device = None if device_type == "cpu" else torch.get_device_module(device_type)
        self._cpu_state = torch.get_rng_state()
        self._device_state = None if self._device is None else self._device.get_rng_state()
        self.left = True

    def go_on(self) -> None:
        """Continues where it was."""
        if self.left:
            torch.set_rng_state(self._cpu_state)
            if self._device is not None:
                self._device.set_rng_state(self._device_state)
        self.left = False


@contextmanager
def own_stream(mesh: DeviceMesh) -> Iterator[None]:
    """Inside, and until :func:`shared_again`, a stream of this rank's own. Communication: none."""
    seed = int(torch.randint(2**31, (), device="cpu"))
    _outer.append(_Stream(mesh.device_type))
    seed_torch(seed + mesh.get_local_rank(), torch.device(mesh.device_type))
    try:
        yield
    finally:
        _outer.pop().go_on()


def shared_again() -> None:
    """Goes on with the shared stream before the end of :func:`own_stream`: what follows is replicated again."""
    if _outer:
        _outer[-1].go_on()
