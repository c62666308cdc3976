"""Which rank of the pipeline holds what a staged tensor stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from lightning_dist.placeholder import is_placeholder

T = TypeVar("T", bound=type)

_STAGE = "lightning_dist_stage"
"""Attribute of a staged tensor: its :class:`StageOwner`."""


class StageOwner:
    """Where the values of a tensor are.

    Args:
        name: of the parameter that it is, or was computed from.
        source: the first rank of the group that holds it.
        group: the ranks of the pipeline; None where there are none any more.
        divided: whether the ranks that hold it may have parts of it.
    """

    def __init__(self, name: str, source: int, group: dist.ProcessGroup | None, divided: bool) -> None:
        self.name, self.source, self.group, self.divided = name, source, group, divided

    def __deepcopy__(self, _: Any) -> StageOwner:
        return self

    def __reduce__(self) -> Any:
        return StageOwner, (self.name, self.source, None, self.divided)  # a group is this process's


class Staged:
    """A tensor that stands for that of a stage on every rank; see [Note: what a stage holds]."""

    __slots__ = ()


_STAGED_AS: dict[type, type] = {}
"""The class of staged tensors, by that of plain ones."""
_PLAIN_AS: dict[type, type] = {}


def stands_for(plain: type) -> Callable[[T], T]:
    """Makes a class that of the staged tensors of a plain class."""

    def register(kind: T) -> T:
        _STAGED_AS[plain], _PLAIN_AS[kind] = kind, plain
        return kind

    return register


def staged(tensor: Any, owner: StageOwner) -> Any:
    """Makes a tensor stand for that of an owner, in place; anything else as it is."""
    kind = _STAGED_AS.get(type(tensor))
    if kind is not None:
        tensor.__class__ = kind
        vars(tensor)[_STAGE] = owner
    return tensor


def owner_of(tensor: Any) -> StageOwner:
    """The stage that owns a staged tensor."""
    return vars(tensor)[_STAGE]


def origin(tensor: Any) -> str | None:
    """The name of the parameter that it is, or was copied from; None for what was never staged."""
    place = vars(tensor).get(_STAGE)
    return None if place is None else place.name


_plain: list[None] = []
"""While not empty, staged tensors are what they are without their classes."""


def are_plain() -> bool:
    """Whether a step or an optimizer runs, for which parameters are plain ones."""
    return bool(_plain)


@contextmanager
def plain_parameters(parameters: Iterable[Any]) -> Iterator[None]:
    """While it lasts, these parameters are what they are without stages, and those of others tensors without memory."""
    found = _set_plain(parameters)
    _plain.append(None)
    try:
        yield
    finally:
        _plain.pop()
        _set_staged(found)


@contextmanager
def staged_parameters(parameters: Iterable[Any]) -> Iterator[None]:
    """Inside of :func:`plain_parameters`: staged tensors stand for the whole again."""
    before = _plain[:]
    _plain.clear()
    found = _set_staged(parameters)
    try:
        yield
    finally:
        _set_plain(found)
        _plain[:] = before


def _set_plain(parameters: Iterable[Any]) -> list[Any]:
    """Gives parameters of this rank's stages the classes that they had; returns those that had ours."""
    found = [p for p in parameters if type(p) in _PLAIN_AS and not is_placeholder(p)]
    for parameter in found:
        parameter.__class__ = _PLAIN_AS[type(parameter)]
    return found


def _set_staged(parameters: Iterable[Any]) -> list[Any]:
    found = [p for p in parameters if type(p) in _STAGED_AS and _STAGE in vars(p) and not is_placeholder(p)]
    for parameter in found:
        parameter.__class__ = _STAGED_AS[type(parameter)]
    return found


def forget_stage(tensor: Any) -> None:
    """Makes a tensor one that was never staged."""
    if type(tensor) in _PLAIN_AS:
        tensor.__class__ = _PLAIN_AS[type(tensor)]
    vars(tensor).pop(_STAGE, None)
