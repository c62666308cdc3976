"""What values are beside tensors: numbers, and dictionaries and objects of the user's that hold others."""

from __future__ import annotations

from typing import Any

from lightning_dist.parallel.rehearsal import is_users_object


def held_items(value: Any) -> dict[Any, Any] | None:
    """The dictionary that has the items of a dictionary, or of an object of the user's; None for anything else."""
    if type(value) is dict:
        return value
    return vars(value) if is_users_object(value) else None


def number_kind(value: Any) -> type | None:
    """bool, int or float; None for anything else. Subclasses of int count as int."""
    if isinstance(value, bool):
        return bool
    return int if isinstance(value, int) else float if type(value) is float else None
