"""What a run puts onto objects of others, and takes off again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

_ABSENT: Any = object()


class Patches:
    """Attributes of others' objects that are other ones for a while; :meth:`undo` gives each back, the newest first.

    [Note: what is patched is taken off]
    All that the product changes on the module, trainer, loops, callbacks, plugins and loaders of a user goes through
    one of these. The strategy owns it and undoes it when the run is torn down, after an exception too; who only needs
    a patch for the length of a ``with`` block makes one of its own. What an undo brings back is the attribute of the
    instance as it was: where the instance had none, its class answers again.
    """

    def __init__(self) -> None:
        self._undos: list[Callable[[], Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Gives the instance another attribute."""
        before = vars(owner).get(name, _ABSENT)
        vars(owner)[name] = value
        self._undos.append(partial(_put_back, owner, name, before))

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Replaces a method of the instance: ``around(original, *args, **kwargs)`` runs instead of it."""
        self.set(owner, name, partial(around, getattr(owner, name)))

    def also(self, undo: Callable[[], Any]) -> None:
        """Remembers a change of another kind by what takes it back: the ``remove`` of a hook's handle, say."""
        self._undos.append(undo)

    def undo(self) -> None:
        """Takes back all changes, the newest first; all of them, also where one fails, whose error is raised then."""
        failed: Exception | None = None
        while self._undos:
            try:
                self._undos.pop()()
            except Exception as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def __enter__(self) -> Patches:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _put_back(owner: Any, name: str, before: Any) -> None:
    if before is _ABSENT:
        vars(owner).pop(name, None)
    else:
        vars(owner)[name] = before
