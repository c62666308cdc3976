"""The replicate axis: every data rank holds the whole module."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.overrides.distributed import prepare_for_backward
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from lightning_dist.parallel.buffers import WrittenBuffers
from lightning_dist.parallel.single_process import SingleProcessRunner
from lightning_dist.transfers import to_device

# renamed in torch 2.15
_BUFFERS = "forward_sync_buffers"
_NO_BUFFER_BROADCAST: dict[str, Any] = {
    _BUFFERS if _BUFFERS in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers": False
}


class DDPRunner(SingleProcessRunner):
    """Runs the steps of a module that every data rank holds whole; DistributedDataParallel averages the gradients.

    Communication: per backward pass that reduces, one all-reduce per bucket of gradients (25 MB) over ``group``; none
    while accumulating. Once, at construction, the first rank's parameters and buffers are broadcast.

    The reducer is told of each loss rather than of each forward pass, so a step may do several backward passes, or
    return tensors that the loss does not depend on. Buffers are not broadcast on every forward pass: see
    :func:`average_buffers` and :class:`WrittenBuffers`.

    [Note: flags of what was used]
    In one process a parameter that the loss does not depend on has no gradient, and the optimizer leaves it alone.
    The reducer wants a gradient of every parameter, so each loss is tied to all of them by an empty one, and what the
    reducer makes of those is taken away again unless some rank used the parameter. Whether one did travels with the
    gradients: the last bucket holds one more parameter, whose "gradient" is a flag for every other one. DDP's own
    ``find_unused_parameters=True`` walks the graph of each loss, and sends what it found in one more all-reduce.

    [Note: parameters that are frozen for a while]
    ``requires_grad`` may change at any time, twice a step for a pair of adversaries. The reducer knows every parameter
    that trained so far; one that is frozen at a backward pass is one that the pass does not use, and its zeros travel
    along. Only what never trained before makes a reducer anew, and so does what all ranks have left frozen for
    ``PATIENCE`` passes, to send no more zeros. Its flag tells "frozen" from "not used", so the ranks agree on that.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(module)
        self.group, self.device = group, device
        self.buffers: WrittenBuffers = WrittenBuffers(module, group)
        self.wrapper: DistributedDataParallel | None = None
        self._patience = PATIENCE
        self._wrap([p for p in self.module.parameters() if p.requires_grad])

    def _wrap(self, trained: list[nn.Parameter]) -> None:
        """Makes a reducer of these; those that are frozen now among them. Communication: none, but of the first."""
        is_first = self.wrapper is None
        self._trained, known = trained, set(trained)
        self._others = [p for p in self.module.parameters() if p not in known]
        self._unused, self._written = list[int](), list[int]()
        self._num_frozen = [0] * len(trained)
        self._token: Tensor | None = None
        self.wrapper = None
        if not trained:
            return
        flagged = _WithFlags(self.module, trained[0].new_zeros(len(trained) + len(self.buffers)))
        self._flags = flagged.flags
        # on the stream of the backward passes: gradients that are made on another are waited for (Lightning #21746)
        with _all_requiring_gradients(trained):
            self.wrapper = DistributedDataParallel(
                flagged,
                device_ids=None if self.device.type == "cpu" else [self.device.index],
                process_group=self.group,
                init_sync=is_first,
                **_NO_BUFFER_BROADCAST,
                gradient_as_bucket_view=True,
            )
        # the reducer is C++: a hook that held this would keep it, and the model, alive for good
        self.wrapper.register_comm_hook(weakref.ref(self), _reduce_bucket)

    def _follow_flags(self) -> None:
        """Makes the reducer anew where it has to know others; see [Note: parameters that are frozen for a while]."""
        if any(p.requires_grad for p in self._others):
            frozen = {p for p in self._others if not p.requires_grad}
            self._wrap([p for p in self.module.parameters() if p not in frozen])
            return
        numbered = zip(self._trained, self._num_frozen, strict=True)
        left = [p for p, number in numbered if number < self._patience or p.requires_grad]
        if len(left) < len(self._trained):
            self._patience *= 2  # so that flags of a long period don't make reducers forever
            self._wrap(left)

    def run(self, step: str, *args: Any, **kwargs: Any) -> Any:
        if step == "training_step":
            self._follow_flags()
        if self.wrapper is not None:
            self._token = _first_node(self._flags)
        return getattr(self.module, step)(*args, **kwargs)

    def before_backward(self, loss: Tensor) -> Tensor:
        if not loss.requires_grad:
            return loss
        if self.reduces:
            self._follow_flags()  # the step may have unfrozen some
        if self.wrapper is None:
            return loss
        self.wrapper.require_backward_grad_sync = self.reduces
        prepare_for_backward(self.wrapper, loss)
        if not self.reduces:
            return loss
        self._written = self.buffers.written()
        token = self._token if self._token is not None else _first_node(self._flags)
        with _all_requiring_gradients(self._trained):
            return _Tied.apply(loss, token, *self._trained)

    def skip_backward(self, held: bool) -> None:
        """Reduces what earlier passes added up by the backward pass of a loss that depends on nothing."""
        if self.reduces and held and self.wrapper is not None:
            self.before_backward(_first_node(self._flags)).backward()
            self.after_backward()

    def reduce_bucket(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Called by the reducer for each bucket, in order, once all gradients of it are there."""
        if bucket.is_last():  # so all gradients are there
            self._unused = [index for index, p in enumerate(self._trained) if p.grad is None]
            assert self._flags.grad is not None
            self._fill(self._flags.grad)
            storages = [tensor.untyped_storage().data_ptr() for tensor in (bucket.buffer(), self._flags.grad)]
            self._flags_travel = storages[0] == storages[1]
        return allreduce_hook(self.group, bucket)

    def _fill(self, flags: Tensor) -> None:
        """Flags of this rank: of each parameter whether it was used, and of each buffer whether it was written."""
        if not self._unused and not self._written:
            flags.fill_(1)[len(self._trained) :].zero_()
            return
        values = [1.0] * len(self._trained) + [0.0] * len(self.buffers)
        for index in self._unused:
            values[index] = _NOT_USED if self._trained[index].requires_grad else _FROZEN
        for number in self._written:
            values[len(self._trained) + number] = 1.0
        flags.copy_(to_device(values, flags.dtype, flags.device))

    def after_backward(self) -> None:
        if self.wrapper is None or not self.reduces:
            return
        flags, self._flags.grad = self._flags.grad, None
        assert flags is not None
        if not self._flags_travel:  # the model has parameters of several dtypes, and theirs were not in the last bucket
            self._fill(flags)
            flags /= dist.get_world_size(self.group)
            dist.all_reduce(flags, group=self.group)
        if self._unused or self._written:  # what this rank used, some rank used: so most steps need not look
            self._heed(flags.tolist())
        else:
            self._num_frozen = [0] * len(self._trained)

    def _heed(self, flags: list[float]) -> None:
        """What the ranks said, on average. The ranks that look are those that did not use, or wrote, something."""
        one_rank = 1 / dist.get_world_size(self.group)
        frozen, self._num_frozen = self._num_frozen, [0] * len(self._trained)
        for index in self._unused:
            if flags[index] < one_rank / 2:
                self._trained[index].grad = None
            if flags[index] == _FROZEN:  # on all ranks, and so all know
                self._num_frozen[index] = frozen[index] + 1
        written = flags[len(self._trained) :]
        self.buffers.send(number for number in self._written if written[number] > 1 - one_rank / 2)


PATIENCE = 100
"""After how many backward passes without it a frozen parameter's zeros are not sent any more."""

_FROZEN, _NOT_USED = 0.0, 2.0**-20
"""Flags of a parameter without a gradient; in sum over all ranks less than one rank's that used it."""


@contextmanager
def _all_requiring_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """DDP and autograd leave out what does not; the accumulator of a frozen one ignores the gradient that it gets."""
    frozen = [p for p in parameters if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _reduce_bucket(replicated, bucket):  # DDP refuses annotations that are strings
    return replicated().reduce_bucket(bucket)


class _WithFlags(nn.Module):
    """A module with one more parameter, which comes first so that DDP puts it last."""

    def __init__(self, module: nn.Module, flags: Tensor) -> None:
        super().__init__()
        self.flags, self.module = nn.Parameter(flags), module


class _Tied(torch.autograd.Function):
    """The loss, as if it depended on all parameters: what it doesn't depend on is told that no gradient comes."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, token: Tensor, *parameters: Tensor) -> Tensor:
        ctx.num_parameters = len(parameters)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, gradient.new_zeros(()), *(None for _ in range(ctx.num_parameters))


class _Token(torch.autograd.Function):
    """Zeros for the gradient of the flags. Autograd runs what was called first last: DDP orders buckets by that."""

    @staticmethod
    def forward(ctx: Any, flags: Tensor) -> Tensor:
        ctx.flags = flags.detach()  # not saved: several backward passes may go through it
        return flags.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return torch.zeros_like(ctx.flags)


def _first_node(flags: Tensor) -> Tensor:
    with torch.enable_grad():
        return _Token.apply(flags)
