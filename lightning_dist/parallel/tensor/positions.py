"""Where the positions of an activation are while it runs through a stack of sequence-parallel blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lightning_dist.compat.torch import version_of
from lightning_dist.parallel.tensor.mappings import gather, gather_from_sequence_region, scatter_to_sequence_region

DIM = 1
"""The dim of positions in (batch, positions, features)."""


@dataclass
class Positions:
    """What the blocks of a stack and the regions inside know of the activation that runs through them.

    Attributes:
        mesh: of the tensor axis.
        length: number of positions of the whole activation.
        shape: of this rank's part.
        is_open: the first block of the stack ran, and the last did not yet.
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
        part = scatter_to_sequence_region(whole, self.mesh, DIM)
        self.shape = tuple(part.shape)
        return part

    def go_on(self, part: Tensor, name: str) -> Tensor:
        """What another block is given, which has to be what the one before returned."""
        same = tuple(part.shape) == self.shape
        if same and self._last is not None and not torch.compiler.is_compiling():
            last, version = self._last
            same = part.data_ptr() == last.data_ptr() and version_of(part) == version
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
            self._last = None if torch.compiler.is_compiling() else (part.detach(), version_of(part))
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

    def gather_input(self, value: Tensor) -> Tensor:
        """An activation that a region inside a block is given, as it uses it.

        Communication: of this rank's part, forward one all-gather and backward one reduce-scatter; of others none.
        """
        if id(value) in self._whole:
            return value  # it was copied to the region with the block
        if tuple(value.shape) == self.shape:
            return gather_from_sequence_region(value, self.mesh, DIM, self.length)
        if tuple(value.shape) == (math.prod(self.shape[:-1]), self.shape[-1]):  # samples and positions in one dim
            return self.gather_input(value.view(self.shape)).flatten(0, 1)
        if value.requires_grad:
            raise ValueError(
                f"sequence_parallel: a divided layer is given an activation {tuple(value.shape)}, which is not the "
                f"block's own {self.shape} (this rank's part), nor one that the block was given; leave it off for this "
                "network"
            )
        return value

    def state(self) -> PositionsState:
        """Where the activation is, for :meth:`restore`."""
        return self.length, self.shape, self._last, self.is_open

    def restore(self, state: PositionsState) -> None:
        """Goes back to where the activation was."""
        self.length, self.shape, self._last, self.is_open = state


PositionsState = tuple[int, tuple[int, ...], tuple[Tensor, int] | None, bool]
"""Length, shape, the tensor that the last block returned with its version, and whether the stack is open."""


class Snapshot(AbstractContextManager[None]):
    """While it is entered, once or more, the activation is where it was when this was made."""

    def __init__(self, positions: Positions) -> None:
        self._positions = positions
        self._then: PositionsState = positions.length, positions.shape, None, positions.is_open

    def __enter__(self) -> None:
        self._now = self._positions.state()
        self._positions.restore(self._then)

    def __exit__(self, *error: Any) -> None:
        self._positions.restore(self._now)
