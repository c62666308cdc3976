"""Gradients of parameters that are tied over a cut: several ranks of a pipeline hold them, and each has a part."""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import nn

from lightning_dist.collectives import all_reduce_tensors
from lightning_dist.dtensors import local_part
from lightning_dist.parallel.pipeline.stages import Pipeline
from lightning_dist.parallel.unused_parameters import grad_or_zeros


class TiedGradients:
    """Sums the gradients of tied parameters over the ranks that hold them.

    Every rank of the world makes the groups of all ``pipelines``, in one order: a backend may make them by splitting
    the world's communicator, and torch names later groups by how many a rank has made.

    Communication per backward pass that reduces: one all-reduce, in place, of the gradients of what the same ranks
    hold, among those.
    """

    def __init__(self, module: nn.Module, pipeline: Pipeline, pipelines: list[list[int]]) -> None:
        self._module = module
        self.groups: list[tuple[list[str], dist.ProcessGroup]] = []
        """Names of what this rank shares with others, and with which."""
        self._summed: list[tuple[nn.Parameter, int]] = []
        """Those whose gradients hold the sum already, and the number of ranks that hold them."""
        names = defaultdict(list)
        for name, _ in module.named_parameters():
            names[pipeline.stages.holders(name)].append(name)
        for holders, tied in sorted(names.items()):
            if len(holders) > 1:
                of_holders, _ = dist.new_subgroups_by_enumeration([[ranks[h] for h in holders] for ranks in pipelines])
                if isinstance(of_holders, dist.ProcessGroup):
                    self.groups.append((tied, of_holders))

    @torch.no_grad()
    def divide(self) -> None:
        """What is summed already must count once when it is summed again with what is added to it."""
        for parameter, num_ranks in self._summed:
            if parameter.grad is not None:
                local_part(parameter.grad).div_(num_ranks)
        self._summed = []

    def sum(self, trained: set[str]) -> None:
        """Sums the gradients of those that were trained, the same on all ranks that hold them."""
        for names, group in self.groups:
            parameters = [self._module.get_parameter(name) for name in names if name in trained]
            if parameters:
                self._sum(parameters, group)

    def _sum(self, parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
        """What no rank used has no gradient; flags travel with the sums, for the ranks that did not use something."""
        unused = [index for index, p in enumerate(parameters) if p.grad is None]
        gradients = [local_part(grad_or_zeros(p)) for p in parameters]
        flags = gradients[0].new_ones(len(parameters))
        for index in unused:
            flags[index] = 0
        all_reduce_tensors([flags, *gradients], group)
        if unused:
            told = flags.tolist()
            for index in unused:
                if not told[index]:
                    parameters[index].grad = None
        num_ranks = dist.get_world_size(group)
        self._summed += [(p, num_ranks) for p in parameters if p.grad is not None]
