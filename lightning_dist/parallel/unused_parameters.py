"""Gradients of sharded units that fully_shard alone gets wrong: of what only some ranks used, of what is frozen for a
while, and of gradients.

[Note: a gradient that only some ranks have]
In one process a parameter has a gradient if any sample of the batch used it, and none (the optimizer leaves it alone)
if no sample did. Data ranks may differ: a branch that depends on the samples. fully_shard reduces the gradients that a
rank has, so two ranks would send buffers of different parameters to each other, and no error would tell. Here a rank
that took part in a unit sends zeros for what it did not use, and a parameter that no rank used gets no gradient.

[Note: who reads a verdict]
What the ranks tell each other of a backward pass lies on the device, and a rank that reads it waits, see
[Note: the host runs ahead]. What this rank used, some rank used: so only one that lacks a gradient reads whether others
have it, at once; and one that wrote a buffer, whether all did, so that all send it from the next step on. What all
ranks have to know alike is read by all at the next backward pass, when the device has the work of that one to do, or
before a validation, a checkpoint and the end of the run: whether they ran the same units, and buffers that only some
wrote. In the first pass all read all of it at once, since most of what is refused, or written, is seen there.

[Note: second derivatives under dp_shard]
fully_shard frees a unit's parameters when its backward has run. With ``create_graph=True`` (a gradient penalty, a
physics-informed loss) that backward was only the first one: what it computed holds the parameters, and the step's own
backward reads them, before any hook of the unit could gather them again. So from the first backward with a graph until
the end of the step's backward units stay gathered, as without resharding; the first backward reduces nothing, since
``torch.autograd.grad`` puts no gradient anywhere. The nodes that hold it run before those of the unit's forward, so the
parameters' gradients are complete when the unit reduces them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dist.collectives import all_reduce_tensors
from lightning_dist.compat import distributed as private
from lightning_dist.compat.torch import DisableTorchFunctionSubclass
from lightning_dist.divided import as_divided
from lightning_dist.divided.compiled import is_compiled
from lightning_dist.divided.gathered import is_outdated, watch
from lightning_dist.parallel.buffers import WrittenBuffers
from lightning_dist.parallel.fsdp_units import make_gradients_alike
from lightning_dist.patches import Patches
from lightning_dist.transfers import LateRead, to_device

_FLAGS = "flags_of_both"


class Flags:
    """Keeps ``requires_grad`` of a unit's parameters alike on what is sharded and on what is gathered.

    [Note: two objects of one parameter]
    fully_shard registers a parameter's shard with the module, and while it is gathered another object, whose
    ``requires_grad`` it sets to the shard's at each gathering. Optimizers hold the shards. So a user's code may set
    either: the registered one, or that of an optimizer, as ``toggle_optimizer`` does. Both were equal once, so where
    they differ one was set since, to what differs from then.
    """

    def __init__(self, param_group: Any) -> None:
        self._group = param_group
        self._agreed = [p.sharded_param.requires_grad for p in param_group.fsdp_params]
        vars(param_group)[_FLAGS] = self
        for wrap in (private.wrap_show_gathered, private.wrap_free_gathered, private.wrap_free_after_forward):
            wrap(param_group, self._agree_and)

    @staticmethod
    def of(param_group: Any) -> Flags:
        """Those of a unit, from an earlier run where there was one."""
        return vars(param_group).get(_FLAGS) or Flags(param_group)

    def _agree_and(self, change: Callable[[], None]) -> None:
        self.agree()
        change()

    def agree(self) -> None:
        """Sets both as whichever was set last. Communication: none."""
        for index, parameter in enumerate(self._group.fsdp_params):
            sharded = parameter.sharded_param
            now = sharded.requires_grad
            gathered = private.gathered_of(parameter)
            if gathered is not None and gathered.requires_grad != now:
                now = not self._agreed[index]
                sharded.requires_grad_(now)
                gathered.requires_grad_(now)
            self._agreed[index] = now

    def agree_if_gathered(self) -> None:
        """As :meth:`agree`; what is not gathered agrees when it is."""
        if self._group.is_unsharded:
            self.agree()


class SecondBackward:
    """Keeps units gathered from a first backward to the step's own; see [Note: second derivatives under dp_shard].

    Memory: the whole parameters of the units that a first backward ran through, until the step's own has ended.
    Communication: none of its own.
    """

    def __init__(self) -> None:
        self._groups: list[Any] = []
        self._free: list[Callable[[], None]] = []
        self._reached: set[int] = set()
        self._in_first = self._holds = self._in_step = False
        self.refuses = False
        """Whether what backward passes hold is freed by somebody else: a pipeline's schedule."""

    def watch(self, param_group: Any) -> None:
        """Wraps what fully_shard does before a group's backward, after it, and when it frees the group."""
        kind = type(param_group)  # whose methods they are, also where an earlier run has put others in their place
        gather, free = kind.pre_backward.__get__(param_group), kind.reshard.__get__(param_group)
        reduce = param_group.post_backward

        def pre_backward(*args: Any) -> None:
            self._reached.add(id(param_group))
            if torch.is_grad_enabled():  # with create_graph=True
                self._refuse_unknown()
                self._in_first = self._holds = True
            gather(*args)

        def post_backward(*args: Any) -> None:
            if not self._in_first:
                reduce(*args)

        def reshard() -> None:
            if not self._holds:
                free()

        param_group.pre_backward, param_group.post_backward, param_group.reshard = pre_backward, post_backward, reshard
        self._groups.append(param_group)
        self._free.append(free)

    def _refuse_unknown(self) -> None:
        if self._in_step or self.refuses:
            raise RuntimeError(
                "a backward pass with create_graph=True through sharded blocks, "
                f"{'under pp' if self.refuses else 'by backward(), which leaves gradients with a graph'}: under "
                "dp_shard, take it with torch.autograd.grad, "
                f"{'and without pp' if self.refuses else 'and call the loss backward once'}, or use dp_replicate"
            )

    def begin(self) -> None:
        """The step's own backward begins."""
        self._in_first, self._in_step = False, True
        self._reached.clear()

    def has_reached(self, param_group: Any) -> bool:
        """Whether the step's own backward has come to a group."""
        return id(param_group) in self._reached

    def end(self) -> bool:
        """The step's own backward has ended; says whether there are gradients that no hook of a unit has seen: those
        that only second derivatives reach.
        """
        self._in_step = False
        parameters = (p for param_group in self._groups for p in param_group.fsdp_params)
        return self._holds and any(getattr(private.gathered_of(p), "grad", None) is not None for p in parameters)

    def free(self) -> None:
        """Frees what was held, once its gradients are reduced."""
        if self._holds:
            self._holds = False
            for free in self._free:
                free()

    def forget(self) -> None:
        """Drops what is left of a step that did not end."""
        self._in_first = self._holds = self._in_step = False


class Verdict:
    """What the ranks of a group told each other: of each number the largest that any of them gave, by name.

    Communication: one all-reduce of 8 bytes a number.
    """

    def __init__(self, numbers: dict[str, list[int]], group: dist.ProcessGroup, device: torch.device) -> None:
        self._lengths = {name: len(given) for name, given in numbers.items()}
        self._largest = to_device([*chain(*numbers.values())], torch.int64, device)
        dist.all_reduce(self._largest, dist.ReduceOp.MAX, group)
        self._late = LateRead(self._largest)

    def read(self) -> dict[str, list[int]]:
        """Waits for all that the device was given."""
        return self._by_name(self._largest.tolist())

    def read_late(self) -> dict[str, list[int]]:
        """Waits for what the device was given before the verdict."""
        return self._by_name(self._late.tolist())

    def _by_name(self, numbers: list[int]) -> dict[str, list[int]]:
        rest = iter(numbers)
        return {name: [next(rest) for _ in range(length)] for name, length in self._lengths.items()}


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
        self._sharded, self._flags, self._ran = list[Any](), list[Flags](), list[str]()
        self._used, self._had = set[int](), set[int]()
        self._trained = set[int]()
        """What required a gradient in some backward pass since gradients were reduced, alike on all ranks."""
        self._last: tuple[Verdict, list[str]] | None = None
        """The verdict that all ranks have to read yet, and the units that this rank ran."""
        self._is_first = True
        self.second = SecondBackward()
        for name, unit in units.items():
            param_groups = private.param_groups_of(unit)
            flags = [Flags.of(param_group) for param_group in param_groups]
            self._flags += flags
            patches.also(unit.register_forward_pre_hook(partial(free_outdated, param_groups), prepend=True).remove)
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
        used = vars(part)["watched_for"] = self._used  # a hook that held self would keep it, and the model, alive
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

    def before_step(self) -> None:
        """Notes which of the whole parameters train, as hooks of units do of theirs."""
        self._trained |= {id(p) for p in self.whole if p.requires_grad}

    def before_backward(self) -> None:
        """Remembers which gradients are there already, from earlier backward passes."""
        self.second.begin()
        self.before_step()
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
                if id(parameter) not in self._trained or private.gathered_of(parameter) is None:
                    continue
                unsharded = parameter.unsharded_param
                accumulated = getattr(parameter, "unsharded_accumulated_grad", None)
                if unsharded.grad is not None or accumulated is not None:
                    self._used.add(id(parameter))
                elif took_part:
                    unsharded.grad = torch.zeros_like(unsharded)
            make_gradients_alike(param_group)
        reduce(*args)

    def agree(self) -> None:
        """Takes the gradients away that no rank had, and averages those of the parameters that are in no unit.

        Communication over the data ranks: one all-reduce of 8 bytes per parameter, 16 per buffer, and 16; one of the
        gradients of the parameters in no unit that train. Who waits for it: see [Note: who reads a verdict].

        Raises: see :meth:`validate`.
        """
        ran, written = self._ran, set(self._buffers.written())
        order = int.from_bytes(hashlib.sha256("\n".join(ran).encode()).digest()[:7], "little")
        mine = {
            "used": [int(id(p) in self._used) for p in self._sharded],
            "whole": [int(p.grad is not None) for p in self.whole],
            "written": [int(number in written) for number in range(len(self._buffers))],
            "left": [int(number not in written) for number in range(len(self._buffers))],
        }
        self._ran = []
        if not any(mine.values()):  # a stage of a pipeline that has neither
            return
        parameters = self.parts or self.whole
        device = parameters[0].device if parameters else self._buffers.device
        verdict = Verdict({**mine, "order": [order, -order]}, self.group, device)
        self.validate()
        self._last = verdict, ran
        averaged = self._averaged()
        if self._is_first or written or averaged or self._lacks():
            self._heed(verdict.read(), written, averaged)
        self._used.clear()
        self._trained.clear()
        if self._is_first:
            self._is_first = False
            self.validate()

    def _lacks(self) -> bool:
        """Whether there are gradients of zeros, which no rank may have used."""
        others = (p for p in self._sharded if id(p) not in self._used and id(p) not in self._had)
        return any(parameter.sharded_param.grad is not None for parameter in others)

    def _averaged(self) -> dict[int, Tensor]:
        """Averages the gradients of what is whole and trains; those that this rank lacks, by number."""
        missing, gradients = dict[int, Tensor](), list[Tensor]()
        for number, parameter in enumerate(self.whole):
            if id(parameter) in self._trained:
                if parameter.grad is None:
                    missing[number] = torch.zeros_like(parameter)
                gradients.append(missing[number] if parameter.grad is None else parameter.grad)
        all_reduce_tensors(gradients, self.group, mean=True)
        return missing

    def _heed(self, told: dict[str, list[int]], written: set[int], averaged: dict[int, Tensor]) -> None:
        for parameter, is_used in zip(self._sharded, told["used"], strict=True):
            if not is_used and id(parameter) not in self._had:
                parameter.sharded_param.grad = None
        for number, gradient in averaged.items():
            if told["whole"][number]:
                self.whole[number].grad = gradient
        self._buffers.send(number for number in written if not told["left"][number])

    def validate(self) -> None:
        """Looks at what the ranks told each other of the last backward pass, once. Communication: none.

        Raises:
            RuntimeError: on every rank, if they did not run the same units in the same order: what they gathered from
                each other were then parts of different units.
        """
        if self._last is None:
            return
        (verdict, ran), self._last = self._last, None
        told = verdict.read_late()
        most, least = told["order"]
        if most != -least:
            raise RuntimeError(
                "under dp_shard every rank has to run the same blocks in a step, in the same order, since each gathers "
                f"the blocks' parameters from the others; this rank ran {', '.join(ran) or 'none'}. Use dp_replicate "
                "for a network whose blocks depend on the samples, or shard_units= to shard them as one"
            )
        self._buffers.send(number for number, is_written in enumerate(told["written"]) if is_written)


def _note_used(used: set[int], parameter: int, _: Tensor) -> None:
    used.add(parameter)


@torch.compiler.disable
def free_outdated(param_groups: list[Any], *_: Any) -> None:
    """Before a unit is gathered: one that is, and whose parts were written to since, has to be gathered again."""
    for param_group in param_groups:
        if is_outdated(param_group):
            private.free_gathered(param_group)


def grad_or_zeros(parameter: nn.Parameter) -> Tensor:
    """The gradient of a parameter that another rank used: this rank's, or zeros."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
