"""Which hooks on a module are a user's own."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import nn

from lightning_dist.compat.torch import BACKWARD_HOOKS, BACKWARD_PRE_HOOKS, FORWARD_HOOKS, FORWARD_PRE_HOOKS
from lightning_dist.parallel.tensor.overrides import overridden

FORWARD = (FORWARD_PRE_HOOKS, FORWARD_HOOKS)
BACKWARD = (BACKWARD_PRE_HOOKS, BACKWARD_HOOKS)


def users_hooks(module: nn.Module, kinds: tuple[str, ...]) -> bool:
    """Whether a module has hooks that neither torch nor this package registered."""
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
                values[f"{name}.{kind}"] = others(child, kind)
    return overridden(module, values) if values else nullcontext()


def others(module: nn.Module, kind: str) -> OrderedDict[int, Any]:
    """A module's hooks of one kind that are not a user's."""
    return OrderedDict((key, hook) for key, hook in vars(module)[kind].items() if not is_users(hook))


def refuse_hooks(module: nn.Module, name: str) -> None:
    """Raises a ValueError if a module that is given and returns this rank's positions has hooks of a user's."""
    if users_hooks(module, (*FORWARD, *BACKWARD)):
        raise ValueError(
            f"sequence_parallel: {name} has hooks, and is given and returns this rank's positions; leave it off for "
            "this network, or put the hooks on modules inside or around the blocks"
        )
