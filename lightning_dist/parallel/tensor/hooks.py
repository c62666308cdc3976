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

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_dist.compat.torch import FORWARD_HOOKS, FORWARD_PRE_HOOKS
from lightning_dist.parallel.tensor.activation_placement import ActivationPlacement, find_placements
from lightning_dist.parallel.tensor.both_ways import both_ways, rounding_of
from lightning_dist.parallel.tensor.call_recorder import CallRecorder
from lightning_dist.parallel.tensor.overrides import overridden
from lightning_dist.parallel.tensor.region import Region, is_whole
from lightning_dist.parallel.tensor.users_hooks import BACKWARD, FORWARD, users_hooks, without_users_hooks
from lightning_dist.parallel.tensor.whole_hooks import Call, WholeHooks, refuse_hook
from lightning_dist.pytree import tree_leaves

_running: list[nn.Module] = []
"""The module whose hooks are seen to, if there is one; what is below it need not."""


@dataclass
class HooksInside:
    """Shows the hooks below one module whole activations; see [Note: hooks inside of a part].

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

        Communication: none without hooks; else once, that of ``both_ways`` and an all-reduce of some numbers.
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
                refuse_hook(child, name, "a hook on its backward would see this rank's part of the gradients")
        return self._wrapped(module, region, hooked)

    def _is_in_part(self, module: nn.Module, name: str) -> bool:
        calls = self._calls[name]
        return not calls or any(
            placement is not None for call in calls for placements in call for placement in placements
        )

    @contextmanager
    def _wrapped(self, module: nn.Module, region: Region, hooked: dict[str, nn.Module]) -> Iterator[None]:
        values: dict[str, Any] = {}
        for name, child in hooked.items():
            if users_hooks(child, FORWARD):
                seen = WholeHooks(self.mesh, region, name, self._calls[name])
                values[f"{name}.{FORWARD_PRE_HOOKS}"] = seen.before(child)
                values[f"{name}.{FORWARD_HOOKS}"] = seen.after(child)
        _running.append(module)
        try:
            with overridden(module, values):
                yield
        finally:
            _running.pop()

    def _find(
        self, module: nn.Module, region: Region, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Notes where the activations of modules lie in the whole ones."""
        of_whole, of_part = CallRecorder(module, names), CallRecorder(module, names)
        _running.append(module)
        try:
            with without_users_hooks(module):
                both_ways(module, region, args, kwargs)  # what has to be checked inside is checked
            both_ways(module, region, args, kwargs, of_whole.recording(), of_part.recording())
        finally:
            _running.pop()
        pairs: list[tuple[Tensor, Tensor]] = []
        for name in names:
            if len(of_whole.calls[name]) != len(of_part.calls[name]):
                refuse_hook(module.get_submodule(name), name, "it is called another number of times")
            for whole, part in zip(of_whole.calls[name], of_part.calls[name], strict=True):
                pairs += zip(_tensors(whole), _tensors(part), strict=True)
        found = iter(find_placements(pairs, self.mesh, region.positions is not None, rounding_of))
        for name in names:
            self._calls[name] = []
            for call, is_shared in zip(of_part.calls[name], of_part.shared[name], strict=True):
                args_, kwargs_, output = (
                    [self._placement(leaf, found, shared, module, name) for leaf in tree_leaves(values)]
                    for values, shared in zip(call, is_shared, strict=True)
                )
                self._calls[name].append((args_, kwargs_, output))

    def _placement(
        self, leaf: Any, found: Iterator[ActivationPlacement | None], shared: bool, module: nn.Module, name: str
    ) -> ActivationPlacement | None:
        if not isinstance(leaf, Tensor):
            return None
        placement = next(found)
        if placement is None:
            refuse_hook(
                module.get_submodule(name), name, f"an activation {tuple(leaf.shape)} is no part of the whole one"
            )
        return None if placement == ActivationPlacement() and not shared else placement


def validate_no_compiled_hooks(module: nn.Module) -> None:
    """Raises a ValueError for users' hooks inside of parts that are about to be compiled, which would see parts."""
    for around in module.modules():
        region = Region.of(around)
        if region is None or region.hooks is None:
            continue
        for name, child in around.named_modules():
            if name and users_hooks(child, (*FORWARD, *BACKWARD)):
                refuse_hook(child, name, "compile= would leave its hooks with parts")


def _tensors(call: tuple[Any, Any, Any]) -> list[Tensor]:
    return [leaf.detach() for values in call for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
