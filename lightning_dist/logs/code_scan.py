"""What a user's hook does, with logged values above all, seen in its code before it runs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any

READS, LOGS, SYNCS, GRADIENTS = "reads", "logs", "syncs", "gradients"

_WORDS = {
    **dict.fromkeys(("callback_metrics", "logged_metrics", "progress_bar_metrics"), READS),
    **dict.fromkeys(("log", "log_dict"), LOGS),
    **dict.fromkeys(("grad", "grad_norm", "clip_grad_norm_"), GRADIENTS),
    "sync_dist": SYNCS,
}
_LIBRARIES = {"lightning", "lightning_dist", "lightning_fabric", "lightning_utilities", "pytorch_lightning"}
_LIBRARIES |= {"torch", "torchmetrics", "torchvision", "transformers", "timm", "numpy", "builtins"}
_LIBRARIES |= set(sys.stdlib_module_names)
_MOST = 2000
"""Functions that are looked at for a hook, in case names lead into a large package."""


def is_library(module_name: str) -> bool:
    """Whether code of this module is none of the user's, nor calls hooks of the user's with logged values in mind."""
    return module_name.partition(".")[0] in _LIBRARIES


def scan_hook(owner: Any, hook: str, words: Mapping[str, str] = _WORDS) -> frozenset[str]:
    """What the user's code in ``owner.hook``, and in what it calls, mentions.

    Which is seen by name: of functions and classes that the code can reach over its module, its closure, its owner, and
    the owner's attributes. Code without these words does not read or log by them; code that has them may still not get
    there. Every rank that runs the same code finds the same.

    Args:
        owner: a callback or a module; ``hook`` names one of its methods.
        words: what to look for, and what is said of it.

    Returns:
        what is said of the words that are there; by default some of ``READS`` (a metrics property of the trainer),
        ``LOGS``, ``SYNCS`` and ``GRADIENTS``.
    """
    start = vars(owner).get(hook) or inspect.getattr_static(type(owner), hook, None)
    waiting, owners = list(_functions(start)), [owner]
    seen: set[CodeType] = set()
    found: set[str] = set()
    while waiting and len(seen) < _MOST:
        function = waiting.pop()
        if function.__code__ in seen or is_library(str(function.__globals__.get("__name__", ""))):
            continue
        seen.add(function.__code__)
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        names = _names(function.__code__) | {value for value in defaults if isinstance(value, str)}
        found |= {words[name] for name in names if name in words}
        reached = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        reached += [function.__globals__[name] for name in names if name in function.__globals__]
        for held in list(owners):
            reached += [vars(held)[name] for name in names if name in getattr(held, "__dict__", ())]
        owners += [value for value in reached if _may_hold(value) and not any(value is held for held in owners)]
        for held in owners:
            kind = held if isinstance(held, (type, ModuleType)) else type(held)
            reached += [inspect.getattr_static(kind, name, None) for name in names]
        waiting += [function for value in reached for function in _functions(value)]
    return frozenset(found)


def _functions(value: Any) -> Iterator[FunctionType]:
    """The Python functions that a call, or a read of a property, would run."""
    if isinstance(value, property):
        value = value.fget
    for _ in range(10):
        if isinstance(value, (staticmethod, classmethod)) or inspect.ismethod(value):
            value = value.__func__
        elif isinstance(value, partial):
            value = value.func
        elif isinstance(value, FunctionType):
            yield value
            value = getattr(value, "__wrapped__", None)
        else:
            return


def _names(code: CodeType) -> set[str]:
    """Names of attributes, globals, keywords, and strings by which ``getattr`` may find one."""
    names = {*code.co_names, *code.co_freevars}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
        elif isinstance(constant, str):
            names.add(constant)
        elif isinstance(constant, tuple):
            names |= {part for part in constant if isinstance(part, str)}
    return names


def _may_hold(value: Any) -> bool:
    """Whether it is the user's, so that its methods may be what is called."""
    if isinstance(value, ModuleType):
        return not is_library(value.__name__)
    kind = value if isinstance(value, type) else type(value)
    return not issubclass(kind, FunctionType) and not is_library(str(kind.__module__))


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
