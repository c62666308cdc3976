"""Nested values and their leaves: torch's pytrees, those of checkpoints with paths, and what modules pass on.

Three walks, since they enter different things:

- ``tree_...`` are torch's own: lists, tuples, dictionaries, and classes that were registered with torch.
- ``map_leaves`` is for checkpoints: plain containers only, by path. What a user's class holds is the user's.
- ``deep_...`` are for batches and outputs of modules: any list, tuple, mapping or dataclass, of whatever class, so that
  transformers' outputs and a user's own batches are entered.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from lightning_dist.compat.torch import (
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_structure,
    tree_unflatten,
)

__all__ = ["PLAIN", "Path", "deep_leaves", "deep_map", "deep_tensors", "map_leaves", "rebuilt"]
__all__ += ["tree_flatten", "tree_leaves", "tree_map", "tree_map_only", "tree_structure", "tree_unflatten"]

Path = tuple[Any, ...]
"""Where a leaf is: keys of dictionaries and positions in lists, outermost first."""

PLAIN: frozenset[type] = frozenset({int, float, complex, bool, str, bytes, type(None)})
"""Types of leaves that can't change. A checkpoint has thousands, of the states of random generators."""

_MAPPINGS = (dict, OrderedDict, defaultdict)
CONTAINERS: frozenset[type] = frozenset({*_MAPPINGS, list, tuple})
"""Types that are entered."""


def map_leaves(
    tree: Any, function: Callable[[Path, Any], Any], path: Path = (), skip: frozenset[type] = frozenset()
) -> Any:
    """The tree with ``function(path, leaf)`` in place of every leaf, in the order of the dictionaries.

    Containers in which nothing changed are the same objects; the others are copies with their attributes (the
    ``_metadata`` of a state dict). Only plain containers are entered: what a user's class holds is the user's. Leaves
    of the types to ``skip`` stay as they are.
    """
    kind = type(tree)
    if kind in skip:
        return tree
    if kind in _MAPPINGS:
        new = {
            key: value if type(value) in skip else map_leaves(value, function, (*path, key), skip)
            for key, value in tree.items()
        }
        if all(new[key] is value for key, value in tree.items()):
            return tree
        result = copy.copy(tree)
        result.update(new)
        return result
    if kind in (list, tuple):
        if skip.issuperset(map(type, tree)):
            return tree
        items = [map_leaves(value, function, (*path, index), skip) for index, value in enumerate(tree)]
        return tree if all(map(lambda a, b: a is b, items, tree)) else kind(items)
    return function(path, tree)


def deep_leaves(value: Any) -> list[Any]:
    """What is in lists, tuples, mappings and dataclasses, at any depth, in a fixed order."""
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in deep_leaves(item)]
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in deep_leaves(item)]
    if is_dataclass(value) and not isinstance(value, type):
        items = (getattr(value, f.name) for f in fields(value) if hasattr(value, f.name))
        return [leaf for item in items for leaf in deep_leaves(item)]
    return [value]


def deep_tensors(value: Any) -> list[Tensor]:
    """The tensors among the leaves."""
    return [leaf for leaf in deep_leaves(value) if isinstance(leaf, Tensor)]


def deep_map(value: Any, function: Callable[[Any], Any]) -> Any:
    """The same structure, of the same classes, with the function's result for each leaf."""
    if isinstance(value, (list, tuple)):
        items = [deep_map(item, function) for item in value]
        if isinstance(value, list):
            return items if type(value) is list else rebuilt(value, items)
        # not by the constructor: that of torch's PackedSequence computes
        return type(value)._make(items) if hasattr(value, "_make") else type(value)(items)
    if isinstance(value, Mapping):  # transformers' outputs are dataclasses too, and keep both in step
        new = {key: deep_map(item, function) for key, item in value.items()}
        return new if type(value) is dict else rebuilt(value, new)
    if is_dataclass(value) and not isinstance(value, type):
        replaced = copy.copy(value)
        for field in fields(value):
            if hasattr(value, field.name):
                object.__setattr__(replaced, field.name, deep_map(getattr(value, field.name), function))
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
