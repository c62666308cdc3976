"""Attributes of modules that are other ones while something runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_MISSING = object()


@contextmanager
def overridden(module: nn.Module, values: dict[str, Any]) -> Iterator[None]:
    """While it lasts, the module (or one below it) finds these values under these dotted names."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, value in values.items():
            owner, _, leaf = name.rpartition(".")
            own = vars(module.get_submodule(owner))
            before.append((own, leaf, own.get(leaf, _MISSING)))
            own[leaf] = value
        yield
    finally:
        for own, leaf, value in reversed(before):
            if value is _MISSING:
                del own[leaf]
            else:
                own[leaf] = value
