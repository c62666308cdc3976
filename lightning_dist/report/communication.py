"""How long a device does nothing but communicate, from the kernels of one step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType, ProfilerActivity
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile

from lightning_dist.compat.torch import is_profiled

Interval = tuple[float, float]
"""Begin and end."""


class StepProfile:
    """Profiles what a GPU runs from :meth:`start` to :meth:`stop`, by torch.profiler's trace of its kernels.

    Both wait for the device once. Communication: the barrier, in :meth:`start`.

    Args:
        device: the GPU.
        barrier: waits for all ranks, which get ready to profile in different times.
    """

    def __init__(self, device: torch.device, barrier: Callable[[], Any]) -> None:
        self._device, self._barrier = device, barrier
        self._profiler: profile | None = None
        self._begin = 0.0

    @property
    def runs(self) -> bool:
        """Whether it has started, and has not stopped."""
        return self._profiler is not None

    def start(self) -> None:
        """Begins; does nothing where somebody else profiles this process, as torch has one profiler at a time."""
        if not is_profiled():
            self._profiler = profile(activities=[ProfilerActivity.CUDA])
            self._profiler.prepare_trace()
        self._barrier()
        torch.cuda.synchronize(self._device)
        if self._profiler is not None:
            self._profiler.start_trace()
            self._begin = time.perf_counter()

    def stop(self) -> float | None:
        """The share of the time, from 0 to 1, in which a collective ran and nothing was computed.

        A kernel of NCCL that waits for another rank runs, so that is in it. None where nothing was started.
        """
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return None
        torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._begin
        profiler.stop_trace()
        return exposed(profiler.events() or (), self._device.index) * 1e-6 / seconds


def exposed(events: Iterable[FunctionEvent], device_index: int | None = None) -> float:
    """Microseconds in which a device runs kernels of NCCL and no other kernel.

    Copies and fills hide nothing: they are neither computation nor communication.

    Args:
        events: of a profile; those of other devices, of the host and of ranges that users name are left out.
        device_index: of the device; None for any.
    """
    collectives: list[Interval] = []
    kernels: list[Interval] = []
    for event in events:
        is_kernel = event.device_type == DeviceType.CUDA and not event.is_user_annotation
        if (
            not is_kernel
            or event.name.startswith(("Memcpy", "Memset"))
            or device_index not in (None, event.device_index)
        ):
            continue
        span = event.time_range.start, event.time_range.end
        (collectives if event.name.startswith("nccl") else kernels).append(span)
    return covered([*collectives, *kernels]) - covered(kernels)


def covered(intervals: Iterable[Interval]) -> float:
    """Length of what some interval covers."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total
