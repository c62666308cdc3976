"""Which parameters and blocks a step used, agreed over the data ranks.

[Note: a gradient that only some ranks have]
In one process a parameter has a gradient if any sample of the batch used it, and none (the optimizer leaves it alone)
if no sample did. Data ranks may differ: a branch that depends on the samples. fully_shard reduces the gradients that a
rank has, so two ranks would send buffers of different parameters to each other, and no error would tell. Here a rank
that took part in a unit sends zeros for what it did not use, and a parameter that no rank used gets no gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


class Usage:
    """Watches the sharded units of a module, and what is not sharded, through each backward pass.

    Args:
        module: which the names belong to; what was deferred may be materialised later.
        units: the sharded units and roots, by name.
        roots: names of those that every step gathers.
        whole: names of the parameters that are in none of them; plain on every rank.
        group: the data ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        units: dict[str, nn.Module],
        roots: set[str],
        whole: list[str],
        group: dist.ProcessGroup,
    ) -> None:
        self.group, self._roots = group, roots
        self._module, self._whole = module, whole
        self._sharded: list[Any] = []
        self._ran: list[str] = []
        self._used: set[int] = set()
        self._had: set[int] = set()
        for name, unit in units.items():
            unit.register_forward_pre_hook(partial(self._note, name))
            for param_group in _param_groups(unit):
                self._sharded += param_group.fsdp_params
                # its own method, also where an earlier run has put another in its place
                reduce = type(param_group).post_backward.__get__(param_group)
                param_group.post_backward = partial(self._fill, name, param_group, reduce)
                param_group.pre_backward = partial(_refuse_graph, type(param_group).pre_backward.__get__(param_group))

    def _note(self, name: str, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._ran.append(name)

    @cached_property
    def whole(self) -> list[nn.Parameter]:
        """The parameters that are in no unit."""
        return [self._module.get_parameter(name) for name in self._whole]

    def before_backward(self) -> None:
        """Remembers which gradients are there already, from earlier backward passes."""
        self._had = {id(p) for p in self._sharded if p.sharded_param.grad is not None}

    def _fill(self, name: str, param_group: Any, reduce: Callable[..., None], *args: Any) -> None:
        """Stands before the reduction of a unit's gradients; see [Note: a gradient that only some ranks have]."""
        if param_group.reduce_grads and (name in self._ran or name in self._roots):
            for parameter in param_group.fsdp_params:
                if not parameter.sharded_param.requires_grad or not hasattr(parameter, "_unsharded_param"):
                    continue
                unsharded = parameter.unsharded_param
                accumulated = getattr(parameter, "unsharded_accumulated_grad", None)
                if unsharded.grad is not None or accumulated is not None:
                    self._used.add(id(parameter))
                else:
                    unsharded.grad = torch.zeros_like(unsharded)
        reduce(*args)

    def agree(self) -> list[nn.Parameter]:
        """Takes the gradients away that no rank had, and tells which of the whole parameters any rank used.

        Returns:
            The parameters of ``whole`` with a gradient on some rank, in the same order on every rank.

        Communication: one all-reduce of 8 bytes per parameter (and 16) over the data ranks.

        Raises:
            RuntimeError: on every rank, if the ranks did not run the same units in the same order: what they gathered
                from each other were then parts of different units.
        """
        flags = [int(id(p) in self._used) for p in self._sharded] + [int(p.grad is not None) for p in self.whole]
        digest = hashlib.sha256("\n".join(self._ran).encode()).digest()
        order = int.from_bytes(digest[:7], "little")
        parameters = [p.sharded_param for p in self._sharded] or self.whole
        verdict = torch.tensor([*flags, order, -order], dtype=torch.int64, device=parameters[0].device)
        dist.all_reduce(verdict, dist.ReduceOp.MAX, self.group)
        *used, most, least = verdict.tolist()
        ran, self._ran, self._used = self._ran, [], set()
        if most != -least:
            raise RuntimeError(
                "under dp_shard every rank has to run the same blocks in a step, in the same order, since each gathers "
                f"the blocks' parameters from the others; this rank ran {', '.join(ran) or 'none'}. Use dp_replicate "
                "for a network whose blocks depend on the samples, or shard_units= to shard them as one"
            )
        for parameter, is_used in zip(self._sharded, used, strict=False):
            if not is_used and id(parameter) not in self._had:
                parameter.sharded_param.grad = None
        return [p for p, is_used in zip(self.whole, used[len(self._sharded) :], strict=True) if is_used]


def _refuse_graph(gather: Callable[..., None], *args: Any) -> None:
    """Stands before what a unit does at the start of its backward; it would free what a second backward reads."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a backward pass with create_graph=True (a gradient penalty, a Hessian) through sharded blocks: dp_shard "
            "frees their parameters before the second backward could use them; use dp_replicate"
        )
    gather(*args)


def _param_groups(unit: nn.Module) -> list[Any]:
    """The groups of parameters that fully_shard communicates at once (private; seen in torch 2.14 and 2.15)."""
    assert isinstance(unit, FSDPModule)
    return list(unit._get_fsdp_state()._fsdp_param_groups)


def filled(parameter: nn.Parameter) -> Tensor:
    """The gradient of a parameter that another rank used: this rank's, or zeros."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
