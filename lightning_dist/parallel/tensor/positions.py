"""Sequence parallel: between the blocks of a chain, each rank holds its part of the positions.

[Note: sequence parallel]
The first block of a chain takes its part of the activation, the last one puts the parts together again; in between,
what is not divided by the tensor plan (norms, dropout, residuals, LayerScale) works on the part. A region inside a
block gathers all positions where it would have taken a replicated activation, and scatters its sum where it would
have left it replicated: the same bytes. See also [Note: positions that are divided].

A weight of a block that is not divided sees this rank's positions, so its gradient is a part of the sum, as are those
of norms of heads; :class:`~lightning_dist.parallel.tensor.axis.TensorAxis` adds all of them in one all-reduce. The same
holds for other activations that a block is given (what an encoder made, a condition): they stay whole and enter once.

What lies between the blocks is the network's own code, on a part of the positions: the chain makes sure that it hands
on what the block before returned. Outputs that a network collects are parts as well; hooks on blocks are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

from lightning_dist.parallel.tensor.collectives import (
    enter,
    enter_positions,
    gather,
    leave_positions,
    scatter_positions,
)
from lightning_dist.parallel.tensor.region import Region
from lightning_dist.parallel.tensor.users_hooks import refuse_hooks
from lightning_dist.pytree import tree_leaves, tree_map
from lightning_dist.random_states import own_stream

DIM = 1
"""Of positions, in (batch, positions, features)."""


@dataclass
class Positions:
    """What the blocks of a chain and the regions inside know of the activation that runs through them.

    Args:
        mesh: of the tensor axis.

    Attributes:
        length: number of positions of the whole activation.
        shape: of this rank's part.
        is_open: a chain began that did not end yet.
        is_inside: a block runs.
    """

    mesh: DeviceMesh
    length: int = 0
    shape: tuple[int, ...] = ()
    is_open: bool = False
    is_inside: bool = False
    _last: tuple[Tensor, int] | None = None
    _whole: set[int] = field(default_factory=set)

    def begin(self, whole: Tensor, name: str) -> Tensor:
        """This rank's part of what the first block is given. Communication: backward one all-gather."""
        if whole.ndim != 3:
            raise ValueError(
                f"sequence_parallel divides the positions of activations (batch, positions, features), and {name} is "
                f"given {tuple(whole.shape)}; leave it off for this network"
            )
        self.length, self.is_open = whole.shape[DIM], True
        part = scatter_positions(whole, self.mesh, DIM)
        self.shape = tuple(part.shape)
        return part

    def go_on(self, part: Tensor, name: str) -> Tensor:
        """What another block is given, which has to be what the one before returned."""
        same = tuple(part.shape) == self.shape
        if same and self._last is not None and not torch.compiler.is_compiling():
            last, version = self._last
            same = part.data_ptr() == last.data_ptr() and _version(part) == version
        if not (same and self.length):
            raise ValueError(
                f"sequence_parallel runs one block right after the other, and {name} is given another activation than "
                "the block before it returned; leave it off for this network"
            )
        return part

    def end(self, part: Tensor, is_last: bool) -> Tensor:
        """What a block returns. Communication: of the last one, forward one all-gather."""
        if not is_last:
            # kept alive, so that no other tensor comes to lie where it lay
            self._last = None if torch.compiler.is_compiling() else (part.detach(), _version(part))
            return part
        self.is_open, self._last = False, None
        return gather(part, self.mesh, DIM, self.length)

    def refuse_open(self) -> None:
        """Raises a ValueError if the last block did not run after the others."""
        if self.is_open:
            self.is_open = False
            raise ValueError(
                "sequence_parallel puts the positions together after the last block, which the network did not run "
                "(layers are dropped, or it ends early); leave it off for this network"
            )

    @contextmanager
    def inside(self, others: list[Tensor]) -> Iterator[None]:
        """While a block runs that was given these activations besides."""
        self.is_inside, self._whole = True, {id(tensor) for tensor in others}
        try:
            yield
        finally:
            self.is_inside, self._whole = False, set()

    def enter(self, value: Tensor) -> Tensor:
        """An activation of a region inside a block.

        Communication: of this rank's part, forward one all-gather and backward one reduce-scatter; of others none.
        """
        if id(value) in self._whole:
            return value  # it entered with the block
        if tuple(value.shape) == self.shape:
            return enter_positions(value, self.mesh, DIM, self.length)
        if value.requires_grad:
            raise ValueError(
                f"sequence_parallel: a divided layer is given an activation {tuple(value.shape)}, which is not the "
                f"block's own {self.shape} (this rank's part), nor one that the block was given; leave it off for this "
                "network"
            )
        return value

    def leave(self, partial: Tensor, dim: int = DIM) -> Tensor:
        """The sum of a region inside a block. Communication: forward one reduce-scatter, backward one all-gather."""
        return leave_positions(partial, self.mesh, dim)


_State = tuple[int, tuple[int, ...], tuple[Tensor, int] | None, bool]


class _Again(AbstractContextManager[None]):
    """While it lasts, a chain is where it was when this was made. May be entered again."""

    def __init__(self, positions: Positions) -> None:
        self._positions = positions
        self._then: _State = positions.length, positions.shape, None, positions.is_open

    def __enter__(self) -> None:
        self._now = self._set(self._then)

    def __exit__(self, *error: Any) -> None:
        self._set(self._now)

    def _set(self, state: _State) -> _State:
        p = self._positions
        before = p.length, p.shape, p._last, p.is_open
        p.length, p.shape, p._last, p.is_open = state
        return before


@dataclass
class SequenceBlock(Region):
    """A block of a chain.

    Args:
        name: of the block, for messages.
        is_first, is_last: in its chain.
    """

    name: str = ""
    is_first: bool = False
    is_last: bool = False

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's own forward, on this rank's positions."""
        assert self.positions is not None
        if self.proof is not None and self.proof.is_due(module):
            last = self.positions._last
            self.proof.run(module, args, kwargs)
            self.positions._last = last  # the comparison's own output went nowhere
        refuse_hooks(module, self.name)
        last = self.positions._last
        with nullcontext() if self.hooks is None else self.hooks.seen_whole(module, self, args, kwargs):
            self.positions._last = last
            return self._run(module, args, kwargs)

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.positions is not None
        begin = self.positions.begin if self.is_first else self.positions.go_on
        args, kwargs, others = self._prepare(args, kwargs, begin)
        dropout = OwnDropout(self.mesh) if self.draws and module.training else nullcontext()
        with self.positions.inside(others), self._shadowed(module), dropout:
            output = type(module).forward(module, *args, **kwargs)
        return _with_first(output, self.positions.end(_first(output), self.is_last))

    def _prepare(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], begin: Callable[[Tensor, str], Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
        """The arguments as the forward gets them, and those of them that stay whole."""
        others: list[Tensor] = []
        entered: dict[int, tuple[Tensor, Tensor]] = {}
        first = iter((True,))

        def whole(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in entered:
                entered[id(value)] = (enter(value, self.mesh) if value.requires_grad else value, value)
                others.append(entered[id(value)][0])
            return entered[id(value)][0]

        def prepared(name: str, value: Any) -> Any:
            if next(first, False):
                return begin(value, self.name)
            return value if name in self.stays else tree_map(whole, value)

        return *self.rewrite(args, kwargs, prepared), others

    def again(self) -> AbstractContextManager[Any]:
        """While the forward is computed again in backward, the chain is where it is now."""
        assert self.positions is not None
        return _Again(self.positions)

    def whole_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As the whole block takes them. Communication: an all-gather, but for the first block."""
        assert self.positions is not None
        if self.is_first:
            return args, kwargs
        hidden = args[0] if args else next(iter(kwargs.values()))
        hidden = gather(hidden, self.mesh, DIM, self.positions.length)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): hidden}

    def whole_output(self, output: Tensor) -> Tensor:
        """As the whole block returns it. Communication: an all-gather, but for the last block."""
        assert self.positions is not None
        return output if self.is_last else gather(output, self.mesh, DIM, self.positions.length)


class OwnDropout(TorchFunctionMode):
    """While it lasts, dropout draws numbers of this rank's own: other positions, other features are dropped.

    What is drawn for a sample as a whole (stochastic depth) is drawn alike on every rank.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with own_stream(self.mesh) if func in _DROPOUTS else nullcontext():
            return func(*args, **(kwargs or {}))


_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _first(output: Any) -> Tensor:
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def _with_first(output: Any, first: Tensor) -> Any:
    """The output with its first tensor replaced."""
    if isinstance(output, Tensor):
        return first
    old = _first(output)
    return tree_map(lambda leaf: first if leaf is old else leaf, output)
