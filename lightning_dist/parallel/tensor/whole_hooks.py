"""Users' hooks of one module inside of a part, shown whole activations while the module around runs once."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_dist.compat.torch import (
    FORWARD_HOOKS,
    FORWARD_HOOKS_WITH_KWARGS,
    FORWARD_PRE_HOOKS,
    FORWARD_PRE_HOOKS_WITH_KWARGS,
)
from lightning_dist.parallel.tensor.activation_placement import ActivationPlacement
from lightning_dist.parallel.tensor.region import Region
from lightning_dist.parallel.tensor.users_hooks import is_users
from lightning_dist.pytree import tree_flatten, tree_unflatten

Call = tuple[list[ActivationPlacement | None], list[ActivationPlacement | None], list[ActivationPlacement | None]]
"""The placements of positional arguments, of arguments by name and of outputs, of one call of a module."""


class WholeHooks:
    """The hooks of one module, while its owner runs once."""

    def __init__(self, mesh: DeviceMesh, region: Region, name: str, calls: list[Call]) -> None:
        self.mesh, self.region, self.name, self.calls = mesh, region, name, calls
        self._index = -1

    def before(self, module: nn.Module) -> OrderedDict[int, Any]:
        hooks: OrderedDict[int, Any] = OrderedDict({-1: self._count})
        for key, hook in vars(module)[FORWARD_PRE_HOOKS].items():
            with_kwargs = key in vars(module)[FORWARD_PRE_HOOKS_WITH_KWARGS]
            hooks[key] = partial(self._pre_hook, hook, with_kwargs) if is_users(hook) else hook
        return hooks

    def after(self, module: nn.Module) -> OrderedDict[int, Any]:
        hooks: OrderedDict[int, Any] = OrderedDict()
        for key, hook in vars(module)[FORWARD_HOOKS].items():
            with_kwargs = key in vars(module)[FORWARD_HOOKS_WITH_KWARGS]
            hooks[key] = partial(self._hook, hook, with_kwargs) if is_users(hook) else hook
        return hooks

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
            refuse_hook(module, self.name, "it did not run when it was compared with the whole one")
        return self.calls[min(self._index, len(self.calls) - 1)]

    def _whole(self, module: nn.Module, value: Any, placements: list[ActivationPlacement | None]) -> Any:
        positions = self.region.positions
        length = 0 if positions is None else positions.length

        def whole(placement: ActivationPlacement, leaf: Tensor) -> Tensor:
            if not placement.fits(leaf, self.mesh):
                refuse_hook(
                    module, self.name, f"an activation {tuple(leaf.shape)} is divided in another way than before"
                )
            return placement.whole(leaf, self.mesh, length)

        return self._mapped(module, value, placements, whole)

    def _part(self, module: nn.Module, value: Any, placements: list[ActivationPlacement | None]) -> Any:
        return self._mapped(module, value, placements, lambda placement, leaf: placement.part(leaf, self.mesh))

    def _mapped(self, module: nn.Module, value: Any, placements: list[ActivationPlacement | None], change: Any) -> Any:
        leaves, spec = tree_flatten(value)
        if len(leaves) != len(placements):
            refuse_hook(module, self.name, "a hook changes how many values there are")
        changed = [
            change(placement, leaf) if placement is not None and isinstance(leaf, Tensor) else leaf
            for leaf, placement in zip(leaves, placements, strict=True)
        ]
        return tree_unflatten(changed, spec)


def refuse_hook(module: nn.Module, name: str, why: str) -> NoReturn:
    """Raises a ValueError for a user's hook on a module inside of a part."""
    raise ValueError(
        f"tp: {name}, a {type(module).__name__}, has hooks and runs on each rank's part, where {why}; put the hook on "
        "a module around it, or leave its layers whole with tensor_plan="
    )
