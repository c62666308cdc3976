"""Copies of a divided module: deep copies, which are plain modules, and those that callbacks made while it was whole.

[Note: copies of a sharded module]
``copy.deepcopy`` of a network in a hook makes an average or a target of it. fully_shard refuses it; here the copy is of
the user's own class, without fully_shard's hooks, and its parameters are divided as the original's. Its forward gathers
each parameter where it is used; element by element it pairs with the original on each rank's part.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from types import MethodType
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from lightning_dist.compat.distributed import STATE_KEYS, own_class
from lightning_dist.compat.torch import HOOKS_OF_MODULES as HOOKS
from lightning_dist.compat.torch import own_parameters
from lightning_dist.divided.tensor import as_divided
from lightning_dist.dtensors import as_dtensor, part_of
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
    return kind.__new__(kind)


def _copy(unit: nn.Module, memo: dict[int, Any]) -> nn.Module:
    copied = memo[id(unit)] = _empty(own_class(unit))
    state: dict[str, Any] = dict(unit.__getstate__())
    gathering = state.pop(ROOT_GATHERING, None)
    for name, before in {} if gathering is None else gathering.methods_before.items():
        state.pop(name, None)
        if before is not None:
            state[name] = before
    for name in ("__deepcopy__", *STATE_KEYS):
        state.pop(name, None)
    _drop_our_hooks(state)
    copied.__setstate__(copy.deepcopy(state, memo))
    for child in copied.modules():
        _drop_our_hooks(vars(child))
    return copied


def _drop_our_hooks(attributes: dict[str, Any]) -> None:
    for name in HOOKS:
        if name in attributes:
            kept = [(key, hook) for key, hook in attributes[name].items() if not _module_of(hook).startswith(_OURS)]
            attributes[name] = type(attributes[name])(kept)


def _module_of(hook: Any) -> str:
    while hasattr(hook, "func"):
        hook = hook.func
    hook = getattr(hook, "hook", hook)  # of nn.Module's own wrapper
    return getattr(hook, "__module__", None) or ""


def divide_copies(owners: Iterable[Any], module: nn.Module) -> None:
    """Divides copies of a module as the module itself is: each rank keeps its part of them. Communication: none.

    Lightning's ``WeightAveraging`` and ``StochasticWeightAveraging`` copy the module in their ``setup``, which comes
    before the strategy's. Element by element an average then works on this rank's part.

    Args:
        owners: the callbacks; any module among their attributes whose parameters are those of ``module``, in name and
            shape, is a copy.
        module: divided.
    """
    likes = dict(module.named_parameters(remove_duplicate=False))
    for copied in copies_of(module, owners):
        _divide(copied, likes)


def copies_of(module: nn.Module, owners: Iterable[Any]) -> Iterator[nn.Module]:
    """The copies of a module, or of what it averages over, that its callbacks keep; see :func:`divide_copies`."""
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    for value in [value for owner in owners for value in vars(owner).values()]:
        copied = value.module if isinstance(value, AveragedModel) else value
        if not isinstance(copied, nn.Module) or copied is module:
            continue
        if {name: parameter.shape for name, parameter in copied.named_parameters()} == shapes:
            yield copied


def _divide(copied: nn.Module, likes: dict[str, nn.Parameter]) -> None:
    divided: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, child in copied.named_modules():
        for name, parameter in own_parameters(child).items():
            like = likes.get(f"{prefix}.{name}" if prefix else name)
            if parameter is None or not isinstance(like, DTensor) or isinstance(parameter, DTensor):
                continue
            if parameter not in divided:  # tied ones stay one
                part = nn.Parameter(as_dtensor(part_of(parameter, like), like), requires_grad=parameter.requires_grad)
                divided[parameter] = as_divided(part)
            own_parameters(child)[name] = divided[parameter]
