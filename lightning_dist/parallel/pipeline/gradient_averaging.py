"""Gradients of stages are averaged over the data ranks, bucket by bucket, while the schedule goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dist.collectives import begin_all_reduce, buckets
from lightning_dist.dtensors import local_part
from lightning_dist.parallel.unused_parameters import grad_or_zeros
from lightning_dist.transfers import to_device

BUCKET_BYTES = 25 * 2**20
"""As DistributedDataParallel has it."""


class GradientAveraging:
    """Averages the gradients of what a rank's stages train.

    [Note: gradients are averaged beside the schedule]
    A stage's gradients are complete in the backward of its last microbatch, while other ranks, or other stages of this
    one, still compute. There each bucket is begun as soon as all its gradients have come, and waited for before anybody
    looks at them. Data ranks may have other numbers of microbatches, and finish other stages first: so buckets are
    begun in one order, from the last stage to the first, and in a stage from the last parameter to the first.

    All that was trained takes part, with zeros where this rank has no gradient, so no rank has to know beforehand what
    others used. Flags of what was used travel in the last bucket, which waits for the end; only ranks that have sent
    zeros look at them, and their hosts wait for the device.

    Communication over ``group``, once per backward pass that reduces: one all-reduce per bucket of gradients (25 MB of
    a dtype, or one tensor), in place, the flags included. Memory: see :func:`begin_all_reduce`.

    Args:
        group: the data ranks.
        device: of the flags.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._queue = deque[_Bucket]()
        self._planned, self._complete = set[nn.Parameter](), set[int]()
        self._waits: list[Callable[[], None]] = []
        self._unused: list[nn.Parameter] = []
        self._running: int | None = None
        """The stage whose last microbatch runs backward."""
        self._whole: dict[int, bool] = {}
        """Whether each parameter of a stage got its gradient at once, and not in parts (by recomputation inside of a
        backward), once it was seen."""

    def begin(self, trained: dict[int, list[nn.Parameter]]) -> None:
        """A schedule begins that completes gradients; what is trained is given by the stage that completes it."""
        self.forget()
        for stage, parameters in sorted(trained.items(), reverse=True):
            self._plan(stage, reversed(parameters))

    def _plan(self, stage: int, parameters: Iterable[nn.Parameter]) -> None:
        for same in buckets(parameters, BUCKET_BYTES):
            self._queue.append(_Bucket(stage, same))
            self._planned.update(same)

    @contextmanager
    def last_backward(self, stage: int) -> Iterator[None]:
        """Around the backward of a stage's last microbatch."""
        handles, self._running = list(self._watch(stage)) if self._whole.get(stage, True) else [], stage
        try:
            yield
        finally:
            self._running = None
            for handle in handles:
                handle.remove()
        self._whole.setdefault(stage, True)
        self._complete.add(stage)
        self._begin_ready()

    def _watch(self, stage: int) -> Iterator[Any]:
        for bucket in self._queue:
            for parameter in bucket.parameters if bucket.stage == stage else ():
                if parameter.requires_grad:
                    yield parameter.register_post_accumulate_grad_hook(partial(self._note, bucket))

    @torch.no_grad()
    def _note(self, bucket: _Bucket, parameter: nn.Parameter) -> None:
        if parameter not in bucket.missing:
            self._whole[bucket.stage] = False
            if bucket not in self._queue:
                raise RuntimeError(
                    "pp: a backward gave a parameter its gradient in several parts, as it did not in the first step; "
                    "use torch.utils.checkpoint with use_reentrant=False"
                )
        bucket.missing.discard(parameter)
        if not bucket.missing:
            self._begin_ready()

    def _begin_ready(self) -> None:
        """Begins those whose turn it is; the last waits for :meth:`finish`. In the first step it is only seen how
        gradients come.
        """
        while len(self._queue) > 1 and self._is_ready(self._queue[0]):
            self._begin(self._gradients(self._queue.popleft()))

    def _is_ready(self, bucket: _Bucket) -> bool:
        has_come = bucket.stage == self._running and self._whole.get(bucket.stage, False) and not bucket.missing
        return has_come or bucket.stage in self._complete

    def _gradients(self, bucket: _Bucket) -> list[Tensor]:
        self._unused += [parameter for parameter in bucket.parameters if parameter.grad is None]
        return [local_part(grad_or_zeros(parameter)) for parameter in bucket.parameters]

    def _begin(self, gradients: list[Tensor]) -> None:
        self._waits.append(begin_all_reduce(gradients, self._group, mean=True))

    @torch.no_grad()
    def finish(self, trained: list[nn.Parameter]) -> None:
        """Averages what is left of all that was trained, in the same order on all ranks, and waits for it."""
        self._plan(-1, [parameter for parameter in reversed(trained) if parameter not in self._planned])
        self._complete |= {bucket.stage for bucket in self._queue}
        self._begin_ready()
        last = self._gradients(self._queue.popleft()) if self._queue else []
        flags = self._flags(trained, last[0].dtype if last else torch.float32)
        if last and not flags.is_floating_point():
            self._begin(last)
            last, flags = [], flags.abs()
        if trained:
            self._begin([*last, flags])
        for wait in self._waits:
            wait()
        self._waits = []
        used = dict(zip(trained, flags.tolist() if self._unused else (), strict=False))
        for parameter in self._unused:
            if not used[parameter]:
                parameter.grad = None
        self.forget()

    def _flags(self, trained: list[nn.Parameter], dtype: torch.dtype) -> Tensor:
        """Whether each parameter was used."""
        if not self._unused:
            return torch.ones(len(trained), dtype=dtype, device=self._device)
        unused = set(self._unused)
        return to_device([float(parameter not in unused) for parameter in trained], dtype, self._device)

    def forget(self) -> None:
        """Drops what is left of a step that did not end; waits for what other ranks have begun too."""
        for wait in self._waits:
            wait()
        self._queue.clear()
        self._planned, self._complete, self._waits, self._unused = set(), set(), [], []


class _Bucket:
    """Parameters of a dtype whose gradients are complete with a stage's."""

    def __init__(self, stage: int, parameters: list[nn.Parameter]) -> None:
        self.stage, self.parameters, self.missing = stage, parameters, set(parameters)
