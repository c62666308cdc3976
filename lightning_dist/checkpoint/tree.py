"""The nested dictionaries, lists and tuples of a checkpoint, walked by path."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

Path = tuple[Any, ...]
"""Where a leaf is: keys of dictionaries and positions in lists, outermost first."""

_MAPPINGS = (dict, OrderedDict, defaultdict)


def map_leaves(tree: Any, function: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """The tree with ``function(path, leaf)`` in place of every leaf, in the order of the dictionaries.

    Containers in which nothing changed are the same objects; the others are copies with their attributes (the
    ``_metadata`` of a state dict). Only plain containers are entered: what a user's class holds is the
    user's.
    """
    kind = type(tree)
    if kind in _MAPPINGS:
        new = {key: map_leaves(value, function, (*path, key)) for key, value in tree.items()}
        if all(new[key] is value for key, value in tree.items()):
            return tree
        result = copy.copy(tree)
        result.update(new)
        return result
    if kind in (list, tuple):
        items = [map_leaves(value, function, (*path, index)) for index, value in enumerate(tree)]
        return tree if all(map(lambda a, b: a is b, items, tree)) else kind(items)
    return function(path, tree)
