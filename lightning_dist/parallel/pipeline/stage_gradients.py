"""Gradients that a schedule computed: put where autograd would have put them, and reduced over stages and data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dist.collectives import all_reduce_tensors
from lightning_dist.dtensors import local_part
from lightning_dist.parallel.buffers import WrittenBuffers
from lightning_dist.parallel.pipeline.stages import Pipeline
from lightning_dist.parallel.unused_parameters import grad_or_zeros
from lightning_dist.placeholder import held


class StageGradients:
    """The gradients of the parameters that a rank of a pipeline holds.

    [Note: gradients of a schedule]
    A schedule computes gradients while Lightning runs ``training_step``; Lightning then zeroes them, and asks for the
    backward of a loss. So they are set aside, and the loss that is returned puts them in place in its backward, scaled
    by what Lightning scaled it with. A sharded parameter's gradient stays where fully_shard gathers it until then.

    Args:
        module: cut.
        pipeline: of this rank.
        pipelines: the ranks of every pipeline of the world, by stage; all of them make one at the same time.
    """

    def __init__(self, module: nn.Module, pipeline: Pipeline, pipelines: list[list[int]]) -> None:
        self._module, self._device = module, pipeline.device
        self._tied = _tied_groups(module, pipeline, pipelines)
        self._aside: list[tuple[nn.Parameter, Tensor]] = []
        self._summed: list[tuple[nn.Parameter, int]] = []
        """Tied parameters whose gradients hold the sum already, and the number of ranks that hold them."""
        self._trained: set[str] = set()
        """Names of what required a gradient in some backward pass since gradients were reduced."""

    @contextmanager
    def aside(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """While it lasts, parameters get gradients of their own, which are kept for :meth:`hand_over`."""
        before = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        yield
        self._aside = [(p, p.grad) for p in parameters if p.grad is not None]
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient

    @torch.no_grad()
    def hand_over(self, ratio: float) -> None:
        """Adds what is aside, times a number, to the parameters' gradients."""
        for parameter, num_ranks in self._summed:
            # what is summed already must count once when it is summed again with what is added to it
            if parameter.grad is not None:
                local_part(parameter.grad).div_(num_ranks)
        self._summed = []
        self._trained.update(name for name, p in self._module.named_parameters() if p.requires_grad)
        for parameter, gradient in self._aside:
            if ratio != 1:
                gradient.mul_(ratio)
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)
        self._aside = []

    @torch.no_grad()
    def reduce(self, data_group: dist.ProcessGroup | None, buffers: WrittenBuffers | None) -> None:
        """Sums what is tied over a cut, and averages over the data ranks (None where they are averaged already), which
        agree on what training wrote of the ``buffers`` of this rank's stages.
        """
        self._sum_tied()
        if data_group is not None:
            assert buffers is not None
            self._average(data_group, buffers)
        self._trained = set()

    def _sum_tied(self) -> None:
        """A tied parameter that no rank used has no gradient; flags of which were used travel with the sums."""
        for names, group in self._tied:
            parameters = [self._module.get_parameter(name) for name in names if name in self._trained]
            if not parameters:
                continue
            used = [float(p.grad is not None) for p in parameters]
            gradients = [local_part(grad_or_zeros(p)) for p in parameters]
            flags = gradients[0].new_tensor(used)
            all_reduce_tensors([flags, *gradients], group)
            for parameter, is_used in zip(parameters, flags.tolist(), strict=True):
                if not is_used:
                    parameter.grad = None
            num_ranks = dist.get_world_size(group)
            self._summed += [(p, num_ranks) for p in parameters if p.grad is not None]

    def _average(self, group: dist.ProcessGroup, buffers: WrittenBuffers) -> None:
        """Averages what any data rank used; see [Note: a gradient that only some ranks have]."""
        parameters = held(p for name, p in self._module.named_parameters() if name in self._trained)
        written = set(buffers.written())
        flags = [p.grad is not None for p in parameters] + [number in written for number in range(len(buffers))]
        if not flags:
            return
        told = torch.tensor(flags, dtype=torch.int64, device=self._device)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=group)
        used = told.tolist()
        buffers.send(number for number, is_written in enumerate(used[len(parameters) :]) if is_written)
        gradients = [local_part(grad_or_zeros(p)) for p, is_used in zip(parameters, used, strict=False) if is_used]
        all_reduce_tensors(gradients, group, mean=True)


class HandOver(torch.autograd.Function):
    """The loss of a finished schedule, whose backward hands over; see [Note: gradients of a schedule]."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, hand_over: Callable[[Tensor], None], loss: Tensor) -> Tensor:
        ctx.hand_over = hand_over
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        ctx.hand_over(scale)
        return torch.zeros_like(scale), None, None


def _tied_groups(
    module: nn.Module, pipeline: Pipeline, pipelines: list[list[int]]
) -> list[tuple[list[str], dist.ProcessGroup]]:
    """Parameters that several ranks of the pipeline hold, by those ranks.

    Every rank of the world makes the groups of all pipelines, in one order: a backend may make them by splitting the
    world's communicator, and torch names later groups by how many a rank has made.
    """
    names = defaultdict(list)
    for name, _ in module.named_parameters():
        names[pipeline.stages.holders(name)].append(name)
    found = []
    for holders, tied in sorted(names.items()):
        if len(holders) > 1:
            of_holders, _ = dist.new_subgroups_by_enumeration([[ranks[h] for h in holders] for ranks in pipelines])
            if isinstance(of_holders, dist.ProcessGroup):
                found.append((tied, of_holders))
    return found
