"""Deep copies of modules that fully_shard took: plain modules of divided parameters.

[Note: copies of a sharded module]
``copy.deepcopy`` of a network in a hook makes an average or a target of it. fully_shard refuses it; here the copy is of
the user's own class, without fully_shard's hooks, and its parameters are divided as the original's. Its forward gathers
each parameter where it is used; element by element it pairs with the original on each rank's part.
"""

from __future__ import annotations

import copy
import copyreg
from types import MethodType
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

_OURS = ("torch.distributed.fsdp.", "lightning_dist.parallel.usage", "lightning_dist.parallel.sharded")
_FSDP_STATE = "__composable_api_state_key"
"""Where torch keeps what its composable transforms know of a module (private; seen in 2.14)."""

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def make_copyable(unit: nn.Module) -> None:
    """Lets ``copy.deepcopy`` copy a module that fully_shard took; see [Note: copies of a sharded module]."""
    vars(unit)["__deepcopy__"] = MethodType(_copy, unit)


def pass_for_own_class(unit: nn.Module) -> None:
    """Makes the class that fully_shard gave a module pass for the user's: by its name, after which code names files or
    messages, and in pickles, which hold a module of the user's class.
    """
    own, made = _own_class(unit), type(unit)
    made.__name__, made.__qualname__, made.__module__ = own.__name__, own.__qualname__, own.__module__
    made.__reduce_ex__ = _reduced  # type: ignore[assignment, method-assign]


def _reduced(unit: nn.Module, protocol: Any) -> Any:
    copied = copy.deepcopy(unit)
    return copyreg._reconstructor, (type(copied), object, None), copied.__getstate__()  # type: ignore[attr-defined]


def _copy(unit: nn.Module, memo: dict[int, Any]) -> nn.Module:
    cls = _own_class(unit)
    copied = cls.__new__(cls)
    memo[id(unit)] = copied
    state: dict[str, Any] = dict(unit.__getstate__())
    for name, before in state.pop("_instance_methods", {}).items():
        state.pop(name, None)
        if before is not None:
            state[name] = before
    for name in ("__deepcopy__", "_root_gathering", "_gather_root"):
        state.pop(name, None)
    state = {name: value for name, value in state.items() if not name.startswith(_FSDP_STATE)}
    state |= {name: _without_ours(state[name]) for name in _HOOKS if name in state}
    copied.__setstate__(copy.deepcopy(state, memo))
    for child in copied.modules():
        for name in _HOOKS:
            if name in vars(child):
                vars(child)[name] = _without_ours(vars(child)[name])
    return copied


def _own_class(unit: nn.Module) -> type[nn.Module]:
    """The user's, of which fully_shard made one of its own."""
    return next(
        base for base in type(unit).__mro__[1:] if not issubclass(base, FSDPModule) and issubclass(base, nn.Module)
    )


def _without_ours(hooks: Any) -> Any:
    return type(hooks)((key, hook) for key, hook in hooks.items() if not _module_of(hook).startswith(_OURS))


def _module_of(hook: Any) -> str:
    while hasattr(hook, "func"):
        hook = hook.func
    hook = getattr(hook, "hook", hook)  # of nn.Module's own wrapper
    return getattr(hook, "__module__", None) or ""
