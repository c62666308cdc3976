"""A user's forward hooks inside of what is divided see whole activations, and may change them.

[Note: hooks inside of a part]
Between a column-wise and a row-wise layer an activation is this rank's part: half of the columns, some of the heads. A
hook there would take statistics of a part. So while the module around runs, the hooks that users registered inside are
shadowed by ones that gather what the hook is given, call it, and go on with this rank's part of what it leaves behind.
Which part that is, is found once, by running the module whole and divided and comparing values, as in
[Note: parts are proved]; what is found nowhere in the whole is refused. Without such hooks nothing is communicated.

An activation that each rank has whole, but uses for its part only, has a gradient that is summed later; the hook's own
use of it counts once (see ``Place``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_dist.parallel.tensor.places import Place, find_places
from lightning_dist.parallel.tensor.proof import both_ways, rounding_of
from lightning_dist.parallel.tensor.region import Region, is_whole
from lightning_dist.parallel.tensor.shadows import shadowed
from lightning_dist.parallel.tensor.users_hooks import (
    BACKWARD,
    FORWARD,
    is_users,
    others,
    users_hooks,
    without_users_hooks,
)
from lightning_dist.pytree import tree_flatten, tree_leaves, tree_unflatten

Call = tuple[list[Place | None], list[Place | None], list[Place | None]]
"""The places of positional arguments, of arguments by name and of outputs, of one call of a module."""


_running: list[nn.Module] = []
"""The module whose hooks are seen to, if there is one; what is below it need not."""


@dataclass
class HooksInside:
    """Of one module around a part; see [Note: hooks inside of a part].

    Args:
        mesh: of the tensor axis.
    """

    mesh: DeviceMesh
    _calls: dict[str, list[Call]] = field(default_factory=dict)

    def seen_whole(
        self, module: nn.Module, region: Region, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AbstractContextManager[None]:
        """While the module's forward runs, hooks inside see whole activations.

        Args:
            module: around the part.
            region: that it is.
            args, kwargs: that its forward is about to run on.

        Raises:
            ValueError: hooks on a backward pass inside; an activation that is not a part of the whole one.

        Communication: none without hooks; else once, that of :func:`~lightning_dist.parallel.tensor.proof.both_ways`
        and an all-reduce of some numbers.
        """
        if _running or is_whole() or torch.compiler.is_compiling():
            return nullcontext()
        below = [(name, child) for name, child in module.named_modules() if name]
        hooked = {name: child for name, child in below if users_hooks(child, (*FORWARD, *BACKWARD))}
        if not hooked:
            return nullcontext()
        if any(name not in self._calls for name in hooked):
            self._find(module, region, list(hooked), args, kwargs)
        for name, child in hooked.items():
            if users_hooks(child, BACKWARD) and self._is_in_part(module, name):
                _refuse(child, name, "a hook on its backward would see this rank's part of the gradients")
        return self._wrapped(module, region, hooked)

    def _is_in_part(self, module: nn.Module, name: str) -> bool:
        calls = self._calls[name]
        return not calls or any(place is not None for call in calls for places in call for place in places)

    @contextmanager
    def _wrapped(self, module: nn.Module, region: Region, hooked: dict[str, nn.Module]) -> Iterator[None]:
        values: dict[str, Any] = {}
        for name, child in hooked.items():
            if users_hooks(child, FORWARD):
                seen = _Seen(self.mesh, region, name, self._calls[name])
                values[f"{name}._forward_pre_hooks"] = seen.before(child)
                values[f"{name}._forward_hooks"] = seen.after(child)
        _running.append(module)
        try:
            with shadowed(module, values):
                yield
        finally:
            _running.pop()

    def _find(
        self, module: nn.Module, region: Region, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Notes where the activations of modules lie in the whole ones."""
        of_whole, of_part = _Recorder(module, names), _Recorder(module, names)
        _running.append(module)
        try:
            with without_users_hooks(module):
                both_ways(module, region, args, kwargs)  # what has to be proved inside is proved
            both_ways(module, region, args, kwargs, of_whole.recording(), of_part.recording())
        finally:
            _running.pop()
        pairs: list[tuple[Tensor, Tensor]] = []
        for name in names:
            if len(of_whole.calls[name]) != len(of_part.calls[name]):
                _refuse(module.get_submodule(name), name, "it is called another number of times")
            for whole, part in zip(of_whole.calls[name], of_part.calls[name], strict=True):
                pairs += zip(_tensors(whole), _tensors(part), strict=True)
        in_positions = region.positions is not None
        found = iter(find_places(pairs, self.mesh, in_positions, rounding_of))
        for name in names:
            self._calls[name] = []
            for call, is_shared in zip(of_part.calls[name], of_part.shared[name], strict=True):
                places: list[list[Place | None]] = []
                for values, shared in zip(call, is_shared, strict=True):
                    places.append([])
                    for leaf in tree_leaves(values):
                        places[-1].append(self._place(leaf, found, shared, module, name))
                self._calls[name].append((places[0], places[1], places[2]))

    def _place(
        self, leaf: Any, found: Iterator[Place | None], shared: bool, module: nn.Module, name: str
    ) -> Place | None:
        if not isinstance(leaf, Tensor):
            return None
        place = next(found)
        if place is None:
            _refuse(module.get_submodule(name), name, f"an activation {tuple(leaf.shape)} is no part of the whole one")
        return None if place == Place() and not shared else place


class _Recorder:
    """What modules are given and return while their owner runs, and whether it is whole for a rank's part (it entered,
    and no row-wise layer left since)."""

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        self.module, self.names = module, names
        self.calls: dict[str, list[tuple[Any, Any, Any]]] = {name: [] for name in names}
        self.shared: dict[str, list[tuple[bool, bool, bool]]] = {name: [] for name in names}
        self._left: set[str] = set()
        regions = {name: region for name, child in module.named_modules() if (region := Region.of(child)) is not None}
        self._entering = [name for name, region in regions.items() if region.enters]
        self._leaving = [name for name, region in regions.items() if region.leaves]
        own = regions.get("")
        self._in_positions = own is not None and own.positions is not None

    def recording(self) -> AbstractContextManager[None]:
        """While it lasts, calls are recorded, and users' hooks are not called."""
        values: dict[str, Any] = {}
        for name in dict.fromkeys([*self.names, *self._leaving]):
            child = self.module.get_submodule(name)
            hooks = others(child, "_forward_hooks")
            if name:
                hooks[-1] = partial(self._note, name)
                values[f"{name}._forward_hooks"] = hooks
                values[f"{name}._forward_hooks_with_kwargs"] = {**vars(child)["_forward_hooks_with_kwargs"], -1: True}
                values[f"{name}._forward_pre_hooks"] = others(child, "_forward_pre_hooks")
        return shadowed(self.module, values)

    def _note(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        part = next((p for p in reversed(self._entering) if not p or name.startswith(f"{p}.")), None)
        before = self._in_positions or (part is not None and part not in self._left)
        if name in self._leaving and part is not None:
            self._left.add(part)
        after = self._in_positions or (part is not None and part not in self._left)
        if name in self.calls:
            self.calls[name].append((args, kwargs, output))
            self.shared[name].append((before, before, after))


class _Seen:
    """The hooks of one module, while its owner runs once."""

    def __init__(self, mesh: DeviceMesh, region: Region, name: str, calls: list[Call]) -> None:
        self.mesh, self.region, self.name, self.calls = mesh, region, name, calls
        self._index = -1

    def before(self, module: nn.Module) -> OrderedDict[int, Any]:
        hooks: OrderedDict[int, Any] = OrderedDict({-1: self._count})
        for key, hook in module._forward_pre_hooks.items():
            with_kwargs = key in module._forward_pre_hooks_with_kwargs
            hooks[key] = partial(self._pre_hook, hook, with_kwargs) if is_users(hook) else hook
        return hooks

    def after(self, module: nn.Module) -> OrderedDict[int, Any]:
        hooks: OrderedDict[int, Any] = OrderedDict()
        for key, hook in module._forward_hooks.items():
            with_kwargs = key in module._forward_hooks_with_kwargs
            hooks[key] = partial(self._hook, hook, with_kwargs) if is_users(hook) else hook
        return hooks

    def _count(self, module: nn.Module, args: Any) -> None:
        self._index += 1

    def _pre_hook(self, hook: Any, with_kwargs: bool, module: nn.Module, args: Any, *kwargs: Any) -> Any:
        places = self._places(module)
        whole = [self._whole(module, value, where) for value, where in zip((args, *kwargs), places, strict=False)]
        changed = hook(module, *whole)
        if changed is None:
            changed = whole if with_kwargs else whole[0]
        elif not with_kwargs and not isinstance(changed, tuple):
            changed = (changed,)
        if not with_kwargs:
            return self._part(module, changed, places[0])
        return tuple(self._part(module, value, where) for value, where in zip(changed, places, strict=False))

    def _hook(self, hook: Any, with_kwargs: bool, module: nn.Module, args: Any, *others: Any) -> Any:
        of_args, of_kwargs, of_output = self._places(module)
        given = [self._whole(module, args, of_args)]
        if with_kwargs:
            given.append(self._whole(module, others[0], of_kwargs))
        output = self._whole(module, others[-1], of_output)
        changed = hook(module, *given, output)
        return self._part(module, output if changed is None else changed, of_output)

    def _places(self, module: nn.Module) -> Call:
        if not self.calls:
            _refuse(module, self.name, "it did not run when it was compared with the whole one")
        return self.calls[min(self._index, len(self.calls) - 1)]

    def _whole(self, module: nn.Module, value: Any, places: list[Place | None]) -> Any:
        positions = self.region.positions
        length = 0 if positions is None else positions.length

        def whole(place: Place, leaf: Tensor) -> Tensor:
            if not place.fits(leaf, self.mesh):
                _refuse(module, self.name, f"an activation {tuple(leaf.shape)} is divided in another way than before")
            return place.whole(leaf, self.mesh, length)

        return self._mapped(module, value, places, whole)

    def _part(self, module: nn.Module, value: Any, places: list[Place | None]) -> Any:
        return self._mapped(module, value, places, lambda place, leaf: place.part(leaf, self.mesh))

    def _mapped(self, module: nn.Module, value: Any, places: list[Place | None], change: Any) -> Any:
        leaves, spec = tree_flatten(value)
        if len(leaves) != len(places):
            _refuse(module, self.name, "a hook changes how many values there are")
        changed = [
            change(place, leaf) if place is not None and isinstance(leaf, Tensor) else leaf
            for leaf, place in zip(leaves, places, strict=True)
        ]
        return tree_unflatten(changed, spec)


def refuse_compiled_hooks(module: nn.Module) -> None:
    """Raises a ValueError for users' hooks inside of parts that are about to be compiled, which would see parts."""
    for around in module.modules():
        region = Region.of(around)
        if region is None or region.hooks is None:
            continue
        for name, child in around.named_modules():
            if name and users_hooks(child, (*FORWARD, *BACKWARD)):
                _refuse(child, name, "compile= would leave its hooks with parts")


def _tensors(call: tuple[Any, Any, Any]) -> list[Tensor]:
    return [leaf.detach() for values in call for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _refuse(module: nn.Module, name: str, why: str) -> Any:
    raise ValueError(
        f"tp: {name}, a {type(module).__name__}, has hooks and runs on each rank's part, where {why}; put the hook on "
        "a module around it, or leave its layers whole with tensor_plan="
    )
