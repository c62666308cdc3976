"""A feed-forward pair that lies in a block beside other things: its layers are parts, and the block is compared.

[Note: pairs in a block]
In a block of OPT or BART the two dense layers lie beside attention and norms, and the block's own code calls them. The
block runs as it is: on whole activations, but for what it does between the two layers, which is on this rank's columns.
The first layer copies what it is given to its part, the second sums over the ranks. In between random numbers come from
a stream of this rank's own, so that dropout of one column is not that of another.

Whether all of that gives the whole's result is seen by comparing the block: its output, and the gradients of what it is
given and of the parameters that are not divided, of which one between the layers would get a part.

A layer that is called while the block does not run (a loss that reads its output, say) gives what the whole one does;
but in backward, where a forward that was called in the block is computed again. Hooks in backward do not record
gradients, as what is computed again does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_dist.compat.torch import is_in_backward
from lightning_dist.parallel.tensor.draws import Drawn, Draws
from lightning_dist.parallel.tensor.region import Args, Kwargs, Region
from lightning_dist.random_states import OwnStream


class BlockPair:
    """What the layers of a pair and the block around them know of each other.

    Args:
        mesh: of the tensor axis.
        draws: what the block may draw.
    """

    def __init__(self, mesh: DeviceMesh, draws: Draws) -> None:
        self.draws, self._stream = draws, OwnStream(mesh)
        self._is_running = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the block runs."""
        self._stream.forget()  # of a forward that was computed again up to here, and no further
        self._is_running = True
        try:
            yield
        finally:
            self._is_running = False
            self.end()

    @property
    def is_in_block(self) -> bool:
        """Whether a layer is called by the block."""
        return self._is_running or (is_in_backward() and torch.is_grad_enabled())

    def begin(self, layer: nn.Module) -> None:
        """What follows is on this rank's columns."""
        if self.draws.now(layer):
            self._stream.moves = self.draws.moves
            self._stream.begin()

    def end(self) -> None:
        """What follows is whole again."""
        self._stream.end()


@dataclass
class ColumnWise(Region):
    """The first layer of a pair, or one of several; see [Note: pairs in a block]."""

    pair: BlockPair | None = None

    def run(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """This rank's columns, where the block calls it."""
        assert self.pair is not None
        if not self.pair.is_in_block:
            return type(module).forward(module, *args, **kwargs)  # with a weight that answers as the whole
        output = super().run(module, args, kwargs)
        self.pair.begin(module)
        return output


@dataclass
class RowWise(Region):
    """The second layer of a pair."""

    pair: BlockPair | None = None

    def run(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """The sum over the ranks, where the block calls it."""
        assert self.pair is not None
        try:
            return super().run(module, args, kwargs)
        finally:  # a forward that is computed again may end here
            self.pair.end()


@dataclass
class Block(Region):
    """The block around a pair."""

    pair: BlockPair | None = None

    def note_draws(self, module: nn.Module, draws: Drawn | None) -> None:
        """Wherever they are drawn in the block: where none are between the layers, nothing comes of it."""
        assert self.pair is not None
        self.pair.draws.noted = draws

    def _run(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        assert self.pair is not None
        with self.pair.running():
            return super()._run(module, args, kwargs)
