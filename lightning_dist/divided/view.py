"""Views of a divided tensor: plain tensors of the whole; what is written to them reaches this rank's part.

[Note: views of a whole]
``p.view(-1)[i] = 0`` or ``tensor.view_as(q).copy_(q)`` (which torch's own ``orthogonal_`` does) write through a view. A
view of a divided tensor is a view of the whole, gathered for it. It remembers where it came from: after each function
of torch that changed the whole (its version counter moved) this rank's part is copied back, and before each that comes
after a change of the part the whole is gathered again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_dist.compat.torch import DisableTorchFunctionSubclass, version_of
from lightning_dist.divided.functions import Way, way_of, writes
from lightning_dist.divided.whole import whole
from lightning_dist.dtensors import from_first_data_rank, full, local_part, part_of
from lightning_dist.pytree import tree_leaves, tree_map


class _Source:
    """The whole of a divided tensor, for views of it; ``divided`` is None for what only draws alike on all ranks."""

    def __init__(self, base: Tensor, divided: DTensor | None, like: DTensor) -> None:
        self.base, self.divided, self.like = base, divided, like
        self._seen = _version(base), 0 if divided is None else _version(local_part(divided))

    def refresh(self) -> None:
        """Gathers again what changed since."""
        if self.divided is not None and _version(local_part(self.divided)) != self._seen[1]:
            with torch.no_grad():
                self.base.copy_(full(self.divided))
            self._note()

    def write_back(self) -> None:
        """Copies this rank's part, if the whole was changed."""
        if self.divided is None or _version(self.base) == self._seen[0] != -1:
            return
        with torch.no_grad():
            local_part(self.divided).copy_(part_of(self.base, self.divided))
        self._note()

    def _note(self) -> None:
        assert self.divided is not None
        self._seen = _version(self.base), _version(local_part(self.divided))


class WholeView(Tensor):
    """See [Note: views of a whole]."""

    _source: _Source

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # first the divided ones are gathered
        kwargs = kwargs or {}
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, WholeView)]
        sources = {id(leaf._source): leaf._source for leaf in leaves}
        with DisableTorchFunctionSubclass():
            for source in sources.values():
                source.refresh()
            result = func(*args, **kwargs)
            if way_of(func) is Way.DRAW and writes(func):
                from_first_data_rank(leaves[0].as_subclass(Tensor), leaves[0]._source.like)
            for source in sources.values():
                source.write_back()
            return tree_map(lambda leaf: _marked(leaf, list(sources.values())), result)


def _marked(leaf: Any, sources: list[_Source]) -> Any:
    """A result that shares the memory of a whole is a view of it too."""
    if not isinstance(leaf, Tensor):
        return leaf
    for source in sources:
        if leaf.untyped_storage().data_ptr() == source.base.untyped_storage().data_ptr():
            if isinstance(leaf, WholeView):
                return leaf
            view = leaf.as_subclass(WholeView)
            view._source = source
            return view
    return leaf.as_subclass(Tensor) if isinstance(leaf, WholeView) else leaf


def view_of_whole(divided: DTensor, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``func``, which makes views, on the whole. Communication: gathers it."""
    base = whole(divided)
    source = _Source(base, divided, divided)
    return tree_map(lambda leaf: _marked(leaf, [source]), func(base, *args, **kwargs))


def shared_draws(created: Tensor, like: DTensor) -> Tensor:
    """A new tensor into which all data ranks draw the same random numbers; see [Note: views of a whole]."""
    return _marked(created, [_Source(created, None, like)])


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else version_of(tensor)
