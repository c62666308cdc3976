"""The replicate axis: every data rank holds the whole module."""

from __future__ import annotations

import inspect
import weakref
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.overrides.distributed import prepare_for_backward
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from lightning_dist.parallel.data import Alone

# renamed in torch 2.15
_BUFFERS = "forward_sync_buffers"
_NO_BUFFER_BROADCAST: dict[str, Any] = {
    _BUFFERS if _BUFFERS in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers": False
}


class Replicated(Alone):
    """Every data rank holds the whole module; DistributedDataParallel's reducer averages the gradients.

    Communication: per backward pass that reduces, one all-reduce per bucket of gradients (25 MB) over ``group``; none
    while accumulating. Once, at construction, the first rank's parameters and buffers are broadcast.

    The reducer is told of each loss rather than of each forward pass, so a step may do several backward passes, or
    return tensors that the loss does not depend on. Buffers are not broadcast on every forward pass: see
    :func:`average_buffers`.

    [Note: flags of what was used]
    In one process a parameter that the loss does not depend on has no gradient, and the optimizer leaves it alone.
    The reducer wants a gradient of every parameter, so each loss is tied to all of them by an empty one, and what the
    reducer makes of those is taken away again unless some rank used the parameter. Whether one did travels with the
    gradients: the last bucket holds one more parameter, whose "gradient" is a flag for every other one. DDP's own
    ``find_unused_parameters=True`` walks the graph of each loss, and sends what it found in one more all-reduce.
    """

    def __init__(self, module: pl.LightningModule, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(module)
        self.group, self.device = group, device
        self._wrap()

    def _wrap(self) -> None:
        self._parameters = list(self.module.parameters())
        self._requires_grad = [p.requires_grad for p in self._parameters]
        self._trained = [p for p in self._parameters if p.requires_grad]
        self._unused: list[int] = []
        self._token: Tensor | None = None
        self.wrapper: DistributedDataParallel | None = None
        if not self._trained:
            return
        on_cpu = self.device.type == "cpu"
        flagged = _WithFlags(self.module, self._trained[0].new_zeros(len(self._trained)))
        self._flags = flagged.flags
        # DDP on CUDA has to be built on a stream of its own: pytorch.org/docs, notes/cuda
        stream = torch.cuda.stream(torch.cuda.Stream()) if self.device.type == "cuda" else nullcontext()
        with stream:
            self.wrapper = DistributedDataParallel(
                flagged,
                device_ids=None if on_cpu else [self.device.index],
                process_group=self.group,
                **_NO_BUFFER_BROADCAST,
                gradient_as_bucket_view=True,
            )
        # the reducer is C++: a hook that held this would keep it, and the model, alive for good
        self.wrapper.register_comm_hook(weakref.ref(self), _reduce_bucket)

    def run(self, step: str, *args: Any) -> Any:
        if [p.requires_grad for p in self._parameters] != self._requires_grad:
            self._wrap()  # a callback froze or unfroze some; DDP noted them at the start
        if self.wrapper is not None:
            self._token = _first_node(self._flags)
        return super().run(step, *args)

    def before_backward(self, loss: Tensor) -> Tensor:
        if self.wrapper is None or not loss.requires_grad:
            return loss
        self.wrapper.require_backward_grad_sync = self.reduces
        prepare_for_backward(self.wrapper, loss)
        if not self.reduces:
            return loss
        token = self._token if self._token is not None else _first_node(self._flags)
        return _Tied.apply(loss, token, *self._trained)

    def reduce_bucket(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Called by the reducer for each bucket, in order, once all gradients of it are there."""
        if bucket.is_last():  # so all gradients are there
            used = [p.grad is not None for p in self._trained]
            self._unused = [index for index, is_used in enumerate(used) if not is_used]
            assert self._flags.grad is not None
            self._flags.grad.copy_(torch.tensor(used)) if self._unused else self._flags.grad.fill_(1)
            self._flags_travel = _holds(bucket.buffer(), self._flags.grad)
        return allreduce_hook(self.group, bucket)

    def after_backward(self) -> None:
        if self.wrapper is None or not self.reduces:
            return
        flags, self._flags.grad = self._flags.grad, None
        assert flags is not None
        if not self._flags_travel:  # the model has parameters of several dtypes, and theirs were not in the last bucket
            flags = torch.ones_like(flags)
            flags[self._unused] = 0
            dist.all_reduce(flags, group=self.group)
        if self._unused:  # what this rank used, some rank used: so most steps need not look at the flags
            for index, on_ranks in zip(self._unused, flags[self._unused].tolist(), strict=True):
                if not on_ranks:
                    self._trained[index].grad = None


def _reduce_bucket(replicated, bucket):  # DDP refuses annotations that are strings
    return replicated().reduce_bucket(bucket)


class _WithFlags(nn.Module):
    """A module with one more parameter, which comes first so that DDP puts it last."""

    def __init__(self, module: nn.Module, flags: Tensor) -> None:
        super().__init__()
        self.flags = nn.Parameter(flags)
        self.module = module


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


def _holds(buffer: Tensor, view: Tensor) -> bool:
    return buffer.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()
