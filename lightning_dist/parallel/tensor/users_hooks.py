"""Which hooks on a module are a user's own, and modules that run without them."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import nn

from lightning_dist.compat.torch import (
    BACKWARD_HOOKS,
    BACKWARD_PRE_HOOKS,
    FORWARD_HOOKS,
    FORWARD_HOOKS_WITH_KWARGS,
    FORWARD_PRE_HOOKS,
)
from lightning_dist.parallel.tensor.region import Region, overridden

FORWARD = (FORWARD_PRE_HOOKS, FORWARD_HOOKS)
BACKWARD = (BACKWARD_PRE_HOOKS, BACKWARD_HOOKS)


def users_hooks(module: nn.Module, kinds: tuple[str, ...]) -> bool:
    """Whether a module has hooks of the user's of these kinds."""
    return any(is_users(hook) for kind in kinds for hook in vars(module)[kind].values())


def is_users(hook: Any) -> bool:
    """Whether neither torch nor this package made it."""
    hook = hook.func if isinstance(hook, partial) else hook
    where = getattr(hook, "__module__", None) or type(hook).__module__
    return where.partition(".")[0] not in ("torch", "lightning_dist")


def without_users_hooks(module: nn.Module) -> AbstractContextManager[None]:
    """While it lasts, users' hooks on what is below the module are not called."""
    values = {}
    for name, child in module.named_modules():
        for kind in FORWARD if name else ():
            if users_hooks(child, (kind,)):
                values[f"{name}.{kind}"] = _others(child, kind)
    return overridden(module, values)


def _others(module: nn.Module, kind: str) -> OrderedDict[int, Any]:
    return OrderedDict((key, hook) for key, hook in vars(module)[kind].items() if not is_users(hook))


def refuse_hooks(module: nn.Module, name: str) -> None:
    """Raises a ValueError if a module that is given and returns this rank's positions has hooks of a user's."""
    if users_hooks(module, (*FORWARD, *BACKWARD)):
        raise ValueError(
            f"sequence_parallel: {name} has hooks, and is given and returns this rank's positions; leave it off for "
            "this network, or put the hooks on modules inside or around the blocks"
        )


class CallRecorder:
    """Notes the calls of some modules while the one around them runs.

    Args:
        module: around them.
        names: of the modules, below it.

    Attributes:
        calls: by name, the positional arguments, the arguments by name, and the output of each call.
        shared: by name, whether each of the three is whole for a rank's part: it was copied to the region, and no
            row-wise layer reduced it since.
    """

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        self.module, self.names = module, names
        self.calls: dict[str, list[tuple[Any, Any, Any]]] = {name: [] for name in names}
        self.shared: dict[str, list[tuple[bool, bool, bool]]] = {name: [] for name in names}
        self._reduced: set[str] = set()
        regions = {name: region for name, child in module.named_modules() if (region := Region.of(child)) is not None}
        self._copying = [name for name, region in regions.items() if region.copies_inputs]
        self._reducing = [name for name, region in regions.items() if region.reduces_output]
        self._in_positions = "" in regions and regions[""].positions is not None

    def recording(self) -> AbstractContextManager[None]:
        """While it lasts, calls are recorded, and users' hooks are not called."""
        values: dict[str, Any] = {}
        for name in {*self.names, *self._reducing} - {""}:
            child = self.module.get_submodule(name)
            hooks = _others(child, FORWARD_HOOKS)
            hooks[-1] = partial(self._note, name)
            values[f"{name}.{FORWARD_HOOKS}"] = hooks
            values[f"{name}.{FORWARD_HOOKS_WITH_KWARGS}"] = {**vars(child)[FORWARD_HOOKS_WITH_KWARGS], -1: True}
            values[f"{name}.{FORWARD_PRE_HOOKS}"] = _others(child, FORWARD_PRE_HOOKS)
        return overridden(self.module, values)

    def _note(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        part = next((p for p in reversed(self._copying) if not p or name.startswith(f"{p}.")), None)
        before = self._is_shared(part)
        if name in self._reducing and part is not None:
            self._reduced.add(part)
        if name in self.calls:
            self.calls[name].append((args, kwargs, output))
            self.shared[name].append((before, before, self._is_shared(part)))

    def _is_shared(self, part: str | None) -> bool:
        return self._in_positions or (part is not None and part not in self._reduced)
