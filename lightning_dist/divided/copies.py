"""Deep copies of modules that fully_shard took: plain modules of divided parameters.

[Note: copies of a sharded module]
``copy.deepcopy`` of a network in a hook makes an average or a target of it. fully_shard refuses it; here the copy is of
the user's own class, without fully_shard's hooks, and its parameters are divided as the original's. Its forward gathers
each parameter where it is used; element by element it pairs with the original on each rank's part.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

from torch import nn

from lightning_dist.compat.distributed import STATE_KEYS, own_class
from lightning_dist.compat.torch import HOOKS_OF_MODULES as HOOKS
from lightning_dist.patches import Patches

_OURS = ("torch.distributed.fsdp.", "lightning_dist.parallel.unused_parameters", "lightning_dist.parallel.fsdp")
ROOT_GATHERING = "lightning_dist_root_gathering"
"""Attribute of a root of fully_shard: what gathers it around its methods, with those that were there before."""


def make_copyable(unit: nn.Module, patches: Patches) -> None:
    """Lets ``copy.deepcopy`` copy a module that fully_shard took; see [Note: copies of a sharded module]."""
    patches.set(unit, "__deepcopy__", MethodType(_copy, unit))


def pass_for_own_class(unit: nn.Module) -> None:
    """Makes the class that fully_shard gave a module pass for the user's: by its name, after which code names files or
    messages, and in pickles, which hold a module of the user's class.
    """
    own, made = own_class(unit), type(unit)
    made.__name__, made.__qualname__, made.__module__ = own.__name__, own.__qualname__, own.__module__
    made.__reduce_ex__ = _reduced  # type: ignore[assignment, method-assign]


def _reduced(unit: nn.Module, protocol: Any) -> Any:
    copied = copy.deepcopy(unit)
    return _empty, (type(copied),), copied.__getstate__()


def _empty(kind: type[nn.Module]) -> nn.Module:
    """A module of a class, of which :mod:`pickle` then sets the state."""
    return kind.__new__(kind)


def _copy(unit: nn.Module, memo: dict[int, Any]) -> nn.Module:
    cls = own_class(unit)
    copied = cls.__new__(cls)
    memo[id(unit)] = copied
    state: dict[str, Any] = dict(unit.__getstate__())
    gathering = state.pop(ROOT_GATHERING, None)
    for name, before in {} if gathering is None else gathering.methods_before.items():
        state.pop(name, None)
        if before is not None:
            state[name] = before
    for name in ("__deepcopy__", *STATE_KEYS):
        state.pop(name, None)
    state |= {name: _without_ours(state[name]) for name in HOOKS if name in state}
    copied.__setstate__(copy.deepcopy(state, memo))
    for child in copied.modules():
        for name in HOOKS:
            if name in vars(child):
                vars(child)[name] = _without_ours(vars(child)[name])
    return copied


def _without_ours(hooks: Any) -> Any:
    return type(hooks)((key, hook) for key, hook in hooks.items() if not _module_of(hook).startswith(_OURS))


def _module_of(hook: Any) -> str:
    while hasattr(hook, "func"):
        hook = hook.func
    hook = getattr(hook, "hook", hook)  # of nn.Module's own wrapper
    return getattr(hook, "__module__", None) or ""
