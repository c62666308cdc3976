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

from lightning_dist.compat.distributed import free_gathered, gathered_of, param_groups_of
from lightning_dist.compat.torch import DisableTorchFunctionSubclass
from lightning_dist.divided import as_divided
from lightning_dist.divided.compiled import is_compiled
from lightning_dist.divided.gathered import is_outdated, watch
from lightning_dist.parallel.buffers import WrittenBuffers
from lightning_dist.parallel.frozen import Flags
from lightning_dist.parallel.mixed_dtypes import make_gradients_alike
from lightning_dist.parallel.second_backward import SecondBackward
from lightning_dist.patches import Patches


class UnusedParameters:
    """Sees which parameters of a module a backward pass does not use, in its sharded units and beside them.

    Args:
        module: which the names belong to; what was deferred may be materialised later.
        units: the sharded units and roots, by name.
        roots: names of those that every step gathers.
        whole: names of the parameters that are in none of them; plain on every rank.
        group: the data ranks.
        buffers: of the module, for which the ranks agree on what training wrote.
        patches: that the hooks of the units go through.
    """

    def __init__(
        self,
        module: nn.Module,
        units: dict[str, nn.Module],
        roots: set[str],
        whole: list[str],
        group: dist.ProcessGroup,
        buffers: WrittenBuffers,
        patches: Patches,
    ) -> None:
        self.group, self._roots, self._buffers = group, roots, buffers
        self._module, self._whole = module, whole
        self._sharded: list[Any] = []
        self._ran: list[str] = []
        self._used: set[int] = set()
        self._had: set[int] = set()
        self._trained: set[int] = set()
        """What required a gradient in some backward pass since gradients were reduced."""
        self._flags: list[Flags] = []
        self.second = SecondBackward()
        for name, unit in units.items():
            param_groups = param_groups_of(unit)
            flags = [Flags.of(param_group) for param_group in param_groups]
            self._flags += flags
            first = unit.register_forward_pre_hook(partial(free_outdated, param_groups), prepend=True)
            patches.also(first.remove)
            patches.also(unit.register_forward_pre_hook(partial(self._note, name, flags)).remove)
            for param_group in param_groups:
                watch(param_group, sees_data=not is_compiled(module))
                self._sharded += param_group.fsdp_params
                # its own method, also where an earlier run has put another in its place
                reduce = type(param_group).post_backward.__get__(param_group)
                param_group.post_backward = partial(self._fill, name, param_group, reduce)
                self.second.watch(param_group)

    def _watch_part(self, parameter: Any) -> None:
        """Notes gradients that a loss sends to the part itself, where it used it outside of its unit's forward."""
        part = as_divided(parameter.sharded_param)
        if vars(part).get("watched_for") is self._used or not part.requires_grad:
            return
        used = vars(part)["watched_for"] = (
            self._used
        )  # a hook that held this would keep it, and the model, alive for good
        with DisableTorchFunctionSubclass():  # of the class that refuses users' hooks
            part.register_hook(partial(_note_used, used, id(parameter)))

    @torch.compiler.disable
    def _note(self, name: str, flags: list[Flags], *_: Any) -> None:
        for of_group in flags:
            of_group.agree_if_gathered()
        if torch.is_grad_enabled():
            self._ran.append(name)

    @cached_property
    def whole(self) -> list[nn.Parameter]:
        """The parameters that are in no unit."""
        return [self._module.get_parameter(name) for name in self._whole]

    @property
    def parts(self) -> list[nn.Parameter]:
        """This rank's parts of the parameters that are in units; a loss may use them directly."""
        return [parameter.sharded_param for parameter in self._sharded]

    def before_backward(self) -> None:
        """Remembers which gradients are there already, from earlier backward passes."""
        self.second.begin()
        for flags in self._flags:
            flags.agree_if_gathered()
        for parameter in self._sharded:
            self._watch_part(parameter)
        self._had = {id(p) for p in self._sharded if p.sharded_param.grad is not None}

    def forget(self) -> None:
        """Drops what was noted of a step that did not end."""
        self.second.forget()
        self._ran = []
        self._used.clear()

    def _fill(self, name: str, param_group: Any, reduce: Callable[..., None], *args: Any) -> None:
        """Runs before a unit's gradients are reduced; see [Note: a gradient that only some ranks have]."""
        self._trained |= {id(p) for p in param_group.fsdp_params if p.sharded_param.requires_grad}
        if param_group.reduce_grads:
            # a forward before an earlier backward was counted with that one; what this backward reaches took part too
            took_part = name in self._ran or name in self._roots or self.second.has_reached(param_group)
            for parameter in param_group.fsdp_params:
                if id(parameter) not in self._trained or gathered_of(parameter) is None:
                    continue
                unsharded = parameter.unsharded_param
                accumulated = getattr(parameter, "unsharded_accumulated_grad", None)
                if unsharded.grad is not None or accumulated is not None:
                    self._used.add(id(parameter))
                elif took_part:
                    unsharded.grad = torch.zeros_like(unsharded)
            make_gradients_alike(param_group)
        reduce(*args)

    def agree(self) -> list[nn.Parameter]:
        """Takes the gradients away that no rank had, and tells which of the whole parameters any rank used.

        Returns:
            The parameters of ``whole`` with a gradient on some rank, in the same order on every rank.

        Communication: one all-reduce of 8 bytes per parameter, and per buffer (and 16), over the data ranks.

        Raises:
            RuntimeError: on every rank, if the ranks did not run the same units in the same order: what they gathered
                from each other were then parts of different units.
        """
        flags = [int(id(p) in self._used) for p in self._sharded] + [int(p.grad is not None) for p in self.whole]
        num_parameters, written = len(flags), set(self._buffers.written())
        flags += [int(number in written) for number in range(len(self._buffers))]
        digest = hashlib.sha256("\n".join(self._ran).encode()).digest()
        order = int.from_bytes(digest[:7], "little")
        if not flags:  # a stage of a pipeline that has neither
            self._ran = []
            return []
        parameters = [p.sharded_param for p in self._sharded] or self.whole
        device = parameters[0].device if parameters else self._buffers.device
        verdict = torch.tensor([*flags, order, -order], dtype=torch.int64, device=device)
        dist.all_reduce(verdict, dist.ReduceOp.MAX, self.group)
        *used, most, least = verdict.tolist()
        ran, self._ran, self._trained = self._ran, [], set()
        self._used.clear()
        if most != -least:
            raise RuntimeError(
                "under dp_shard every rank has to run the same blocks in a step, in the same order, since each gathers "
                f"the blocks' parameters from the others; this rank ran {', '.join(ran) or 'none'}. Use dp_replicate "
                "for a network whose blocks depend on the samples, or shard_units= to shard them as one"
            )
        for parameter, is_used in zip(self._sharded, used, strict=False):
            if not is_used and id(parameter) not in self._had:
                parameter.sharded_param.grad = None
        self._buffers.send(number for number, is_written in enumerate(used[num_parameters:]) if is_written)
        whole = used[len(self._sharded) : num_parameters]
        return [p for p, is_used in zip(self.whole, whole, strict=True) if is_used]


def _note_used(used: set[int], parameter: int, _: Tensor) -> None:
    used.add(parameter)


@torch.compiler.disable
def free_outdated(param_groups: list[Any], *_: Any) -> None:
    """Before a unit is gathered: one that is, and whose parts were written to since, has to be gathered again."""
    for param_group in param_groups:
        if is_outdated(param_group):
            free_gathered(param_group)


def grad_or_zeros(parameter: nn.Parameter) -> Tensor:
    """The gradient of a parameter that another rank used: this rank's, or zeros."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
