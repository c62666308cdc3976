"""Nested values: the tensors in what modules pass to each other and in batches, and the same with others in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from lightning_dist.parallel.rehearsal import is_users_object

PLAIN = (type(None), bool, int, float, complex, str, bytes)


def held_items(value: Any) -> dict[Any, Any] | None:
    """Of a dictionary, or an object of the user's, the dictionary that has its items; None for anything else."""
    if type(value) is dict:
        return value
    return vars(value) if is_users_object(value) else None


def number_kind(value: Any) -> type | None:
    """bool, int or float; None for anything else. Subclasses of int count as int."""
    if isinstance(value, bool):
        return bool
    return int if isinstance(value, int) else float if type(value) is float else None


def leaves(value: Any) -> list[Any]:
    """What is in lists, tuples, mappings and dataclasses, at any depth, in a fixed order."""
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if is_dataclass(value) and not isinstance(value, type):
        return [leaf for f in fields(value) if hasattr(value, f.name) for leaf in leaves(getattr(value, f.name))]
    return [value]


def tensors(value: Any) -> list[Tensor]:
    """The tensors among the leaves."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """The same structure, of the same classes, with the function's result for each leaf."""
    if isinstance(value, (list, tuple)):
        items = [mapped(item, function) for item in value]
        if isinstance(value, list):
            return items if type(value) is list else rebuilt(value, items)
        # not by the constructor: that of torch's PackedSequence computes
        return type(value)._make(items) if hasattr(value, "_make") else type(value)(items)
    if isinstance(value, Mapping):  # transformers' outputs are dataclasses too, and keep both in step
        new = {key: mapped(item, function) for key, item in value.items()}
        return new if type(value) is dict else rebuilt(value, new)
    if is_dataclass(value) and not isinstance(value, type):
        replaced = copy.copy(value)
        for field in fields(value):
            if hasattr(value, field.name):
                object.__setattr__(replaced, field.name, mapped(getattr(value, field.name), function))
        return replaced
    return function(value)


def rebuilt(value: Any, new: Any) -> Any:
    """A copy of a list or mapping of a class of its own, with other items."""
    replaced = copy.copy(value)
    if isinstance(value, list):
        replaced[:] = new
        return replaced
    for key, item in new.items():
        replaced[key] = item
    return replaced
