"""A user's forward hooks inside of what is divided see whole activations, and may change them.

[Note: hooks inside of a part]
Between a column-wise and a row-wise layer an activation is this rank's part: half of the columns, some of the heads. A
hook there would take statistics of a part. So while the module around runs, other hooks stand for those that users
registered inside: they gather what the hook is given, call it, and go on with this rank's part of what it returns.
Which part that is, is found once, by running the module whole and divided and comparing values, as in
[Note: parts are checked]; what is found nowhere in the whole is refused. Without such hooks nothing is communicated.

An activation that each rank has whole, but uses for its part only, has a gradient that is summed later; the hook's own
use of it counts once (see ``ActivationPlacement``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_dist.compat.torch import (
    FORWARD_HOOKS,
    FORWARD_HOOKS_WITH_KWARGS,
    FORWARD_PRE_HOOKS,
    FORWARD_PRE_HOOKS_WITH_KWARGS,
)
from lightning_dist.parallel.tensor.activation_placement import ActivationPlacement, find_placements
from lightning_dist.parallel.tensor.equivalence import both_ways
from lightning_dist.parallel.tensor.region import Args, Kwargs, Region, is_whole, overridden, tensors_in
from lightning_dist.parallel.tensor.users_hooks import (
    BACKWARD,
    FORWARD,
    CallRecorder,
    is_users,
    users_hooks,
    without_users_hooks,
)
from lightning_dist.pytree import tree_flatten, tree_leaves, tree_unflatten
from lightning_dist.random_states import kept_random_states

Placements = list[ActivationPlacement | None]
Call = tuple[Placements, Placements, Placements]
"""The placements of positional arguments, of arguments by name and of outputs, of one call of a module."""

_running: list[nn.Module] = []
"""The module whose hooks are seen to, if there is one; what is below it need not."""


@dataclass
class HooksInside:
    """Shows the hooks below one module whole activations; see [Note: hooks inside of a part]."""

    mesh: DeviceMesh
    _calls: dict[str, list[Call]] = field(default_factory=dict)

    def seen_whole(self, module: nn.Module, region: Region, args: Args, kwargs: Kwargs) -> AbstractContextManager[None]:
        """While the module, a region, runs its forward on these arguments, hooks inside see whole activations.

        Raises:
            ValueError: hooks on a backward pass inside; an activation that is not a part of the whole one.

        Communication: none without hooks; else once, that of ``both_ways`` and an all-reduce of some numbers.
        """
        if _running or is_whole() or torch.compiler.is_compiling():
            return nullcontext()
        if not (hooked := _hooked(module)):
            return nullcontext()
        if any(name not in self._calls for name in hooked):
            self._find(module, region, list(hooked), args, kwargs)
        for name, child in hooked.items():
            if users_hooks(child, BACKWARD) and self._is_in_part(name):
                _refuse_hook(child, name, "a hook on its backward would see this rank's part of the gradients")
        return self._wrapped(module, region, hooked)

    def _is_in_part(self, name: str) -> bool:
        calls = self._calls[name]
        return not calls or any(where is not None for call in calls for placements in call for where in placements)

    @contextmanager
    def _wrapped(self, module: nn.Module, region: Region, hooked: dict[str, nn.Module]) -> Iterator[None]:
        values: dict[str, Any] = {}
        for name, child in hooked.items():
            if users_hooks(child, FORWARD):
                seen = _WholeHooks(self.mesh, region, name, self._calls[name])
                values[f"{name}.{FORWARD_PRE_HOOKS}"] = seen.before(child)
                values[f"{name}.{FORWARD_HOOKS}"] = seen.after(child)
        _running.append(module)
        try:
            with overridden(module, values):
                yield
        finally:
            _running.pop()

    def _find(self, module: nn.Module, region: Region, names: list[str], args: Args, kwargs: Kwargs) -> None:
        of_whole, of_part = CallRecorder(module, names), CallRecorder(module, names)
        _running.append(module)
        try:
            with kept_random_states(torch.device(self.mesh.device_type)):
                with without_users_hooks(module):
                    both_ways(module, region, args, kwargs)  # what has to be checked inside is checked
                both_ways(module, region, args, kwargs, of_whole.recording(), of_part.recording())
        finally:
            _running.pop()
        pairs: list[tuple[Tensor, Tensor]] = []
        for name in names:
            if len(of_whole.calls[name]) != len(of_part.calls[name]):
                _refuse_hook(module.get_submodule(name), name, "it is called another number of times")
            for calls in zip(of_whole.calls[name], of_part.calls[name], strict=True):
                pairs += zip(*([tensor.detach() for tensor in tensors_in(call)] for call in calls), strict=True)
        found = iter(find_placements(pairs, self.mesh, region.positions is not None))

        def placement(leaf: Any, is_shared: bool, name: str) -> ActivationPlacement | None:
            if not isinstance(leaf, Tensor):
                return None
            where = next(found)
            if where is None:
                why = f"an activation {tuple(leaf.shape)} is no part of the whole one"
                _refuse_hook(module.get_submodule(name), name, why)
            return None if where == ActivationPlacement() and not is_shared else where

        for name in names:
            self._calls[name] = []
            for call, is_shared in zip(of_part.calls[name], of_part.shared[name], strict=True):
                given, by_name, output = (
                    [placement(leaf, shared, name) for leaf in tree_leaves(values)]
                    for values, shared in zip(call, is_shared, strict=True)
                )
                self._calls[name].append((given, by_name, output))


def validate_no_compiled_hooks(module: nn.Module) -> None:
    """Raises a ValueError for users' hooks inside of parts that are about to be compiled, which would see parts."""
    for around in module.modules():
        region = Region.of(around)
        for name, child in _hooked(around).items() if region is not None and region.hooks is not None else ():
            _refuse_hook(child, name, "compile= would leave its hooks with parts")


def _hooked(module: nn.Module) -> dict[str, nn.Module]:
    """The modules below one that have hooks of the user's."""
    return {name: m for name, m in module.named_modules() if name and users_hooks(m, (*FORWARD, *BACKWARD))}


class _WholeHooks:
    """The hooks of one module, shown whole activations while the module around it runs once."""

    def __init__(self, mesh: DeviceMesh, region: Region, name: str, calls: list[Call]) -> None:
        self.mesh, self.region, self.name, self.calls = mesh, region, name, calls
        self._index = -1

    def before(self, module: nn.Module) -> OrderedDict[int, Any]:
        hooks = _replaced(vars(module)[FORWARD_PRE_HOOKS], self._pre_hook, vars(module)[FORWARD_PRE_HOOKS_WITH_KWARGS])
        return OrderedDict({-1: self._count}) | hooks

    def after(self, module: nn.Module) -> OrderedDict[int, Any]:
        return _replaced(vars(module)[FORWARD_HOOKS], self._hook, vars(module)[FORWARD_HOOKS_WITH_KWARGS])

    def _count(self, module: nn.Module, args: Any) -> None:
        self._index += 1

    def _pre_hook(self, hook: Any, with_kwargs: bool, module: nn.Module, args: Any, *kwargs: Any) -> Any:
        placements = self._placements(module)
        whole = [self._whole(module, value, where) for value, where in zip((args, *kwargs), placements, strict=False)]
        changed = hook(module, *whole)
        if changed is None:
            changed = whole if with_kwargs else whole[0]
        elif not with_kwargs and not isinstance(changed, tuple):
            changed = (changed,)
        if not with_kwargs:
            return self._part(module, changed, placements[0])
        return tuple(self._part(module, value, where) for value, where in zip(changed, placements, strict=False))

    def _hook(self, hook: Any, with_kwargs: bool, module: nn.Module, args: Any, *others: Any) -> Any:
        of_args, of_kwargs, of_output = self._placements(module)
        given = [self._whole(module, args, of_args)]
        if with_kwargs:
            given.append(self._whole(module, others[0], of_kwargs))
        output = self._whole(module, others[-1], of_output)
        changed = hook(module, *given, output)
        return self._part(module, output if changed is None else changed, of_output)

    def _placements(self, module: nn.Module) -> Call:
        if not self.calls:
            _refuse_hook(module, self.name, "it did not run when it was compared with the whole one")
        return self.calls[min(self._index, len(self.calls) - 1)]

    def _whole(self, module: nn.Module, value: Any, placements: Placements) -> Any:
        length = 0 if self.region.positions is None else self.region.positions.length

        def whole(placement: ActivationPlacement, leaf: Tensor) -> Tensor:
            if not placement.fits(leaf, self.mesh):
                why = f"an activation {tuple(leaf.shape)} is divided in another way than before"
                _refuse_hook(module, self.name, why)
            return placement.whole(leaf, self.mesh, length)

        return self._mapped(module, value, placements, whole)

    def _part(self, module: nn.Module, value: Any, placements: Placements) -> Any:
        return self._mapped(module, value, placements, lambda placement, leaf: placement.part(leaf, self.mesh))

    def _mapped(self, module: nn.Module, value: Any, placements: Placements, change: Any) -> Any:
        leaves, spec = tree_flatten(value)
        if len(leaves) != len(placements):
            _refuse_hook(module, self.name, "a hook changes how many values there are")
        changed = [
            change(placement, leaf) if placement is not None and isinstance(leaf, Tensor) else leaf
            for leaf, placement in zip(leaves, placements, strict=True)
        ]
        return tree_unflatten(changed, spec)


def _replaced(hooks: OrderedDict[int, Any], by: Any, with_kwargs: Any) -> OrderedDict[int, Any]:
    """Hooks of which each of the user's is called by another one, told whether it takes arguments by name."""
    return OrderedDict(
        (k, partial(by, hook, k in with_kwargs) if is_users(hook) else hook) for k, hook in hooks.items()
    )


def _refuse_hook(module: nn.Module, name: str, why: str) -> NoReturn:
    raise ValueError(
        f"tp: {name}, a {type(module).__name__}, has hooks and runs on each rank's part, where {why}; put the hook on "
        "a module around it, or leave its layers whole with tensor_plan="
    )
