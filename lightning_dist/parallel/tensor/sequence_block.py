"""Sequence parallel: between the blocks of a stack, each rank holds its part of the positions.

[Note: sequence parallel]
The first block of a stack takes its part of the activation, the last one puts the parts together again; in between,
what is not divided by the tensor plan (norms, dropout, residuals, LayerScale) works on the part. A region inside a
block gathers all positions where it would have taken a replicated activation, and scatters its sum where it would
have left it replicated: the same bytes. See also [Note: positions that are divided].

A weight of a block that is not divided sees this rank's positions, so its gradient is a part of the sum, as are those
of norms of heads; :class:`~lightning_dist.parallel.tensor.split.TensorAxis` adds all in one all-reduce. The same
holds for other activations that a block is given (what an encoder made, a condition): they stay whole and are copied to
the region once.

What lies between the blocks is the network's own code, on a part of the positions: the stack makes sure that it hands
on what the block before returned. Outputs that a network collects are parts as well; hooks on blocks are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

from lightning_dist.parallel.tensor.block_pair import BlockPair
from lightning_dist.parallel.tensor.draws import Drawn
from lightning_dist.parallel.tensor.mappings import gather
from lightning_dist.parallel.tensor.positions import DIM, Snapshot
from lightning_dist.parallel.tensor.region import Args, Kwargs, Region, once_each, tensors_in
from lightning_dist.parallel.tensor.users_hooks import refuse_hooks
from lightning_dist.pytree import tree_map
from lightning_dist.random_states import own_stream


@dataclass
class SequenceBlock(Region):
    """A block of a stack, see [Note: sequence parallel].

    Args:
        pair: of the feed-forward layers in it, where they lie beside other things.
        name: of the block, for messages.
        is_first, is_last: in its stack.
    """

    pair: BlockPair | None = None
    name: str = ""
    is_first: bool = False
    is_last: bool = False

    def run(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """The block's own forward, on this rank's positions."""
        assert self.positions is not None
        before = self.positions.state()
        if self.check is not None:
            self.check.before_run(module, self, args, kwargs)
            self.positions.restore(before)  # what a comparison gave went nowhere
        refuse_hooks(module, self.name)
        with nullcontext() if self.hooks is None else self.hooks.seen_whole(module, self, args, kwargs):
            self.positions.restore(before)
            return self._run(module, args, kwargs)

    def note_draws(self, module: nn.Module, draws: Drawn | None) -> None:
        """Also of the parts inside, which are not compared by themselves."""
        if self.draws is None or draws == self.draws.noted:
            return
        self.draws.noted = draws
        for child in module.modules():
            if child is not module and (region := Region.of(child)) is not None:
                region.note_draws(child, draws)
        if self.pair is not None:
            self.pair.draws.noted = draws

    def _run(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        assert self.positions is not None
        begin = self.positions.begin if self.is_first else self.positions.go_on
        args, kwargs, others = self._prepare(args, kwargs, begin)
        is_drawing = self.draws is not None and self.draws.now(module)
        dropout = OwnDropout(self.mesh) if is_drawing else nullcontext()
        pair = nullcontext() if self.pair is None else self.pair.running()
        with self.positions.inside(others), self._local_view(module), dropout, pair:
            output = type(module).forward(module, *args, **kwargs)
        first = tensors_in(output)[0]
        ended = self.positions.end(first, self.is_last)
        return tree_map(lambda leaf: ended if leaf is first else leaf, output)

    def _prepare(
        self, args: Args, kwargs: Kwargs, begin: Callable[[Tensor, str], Tensor]
    ) -> tuple[Args, Kwargs, list[Tensor]]:
        """The arguments as the forward gets them, and those of them that stay whole."""
        others: list[Tensor] = []
        first = iter((True,))

        def whole(value: Tensor) -> Tensor:
            others.append(self.copied(value))
            return others[-1]

        other = once_each(whole)

        def prepared(name: str, value: Any) -> Any:
            if next(first, False):
                return begin(value, self.name)
            return value if self.is_own(name, value) else tree_map(other, value)

        return *self.rewrite(args, kwargs, prepared), others

    def again(self) -> AbstractContextManager[Any]:
        """While the forward is computed again in backward, the activation is where it is now."""
        assert self.positions is not None
        return Snapshot(self.positions)

    def whole_arguments(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """As the whole block takes them. Communication: an all-gather, but for the first block."""
        assert self.positions is not None
        length, is_part = self.positions.length, iter((not self.is_first,))

        def whole(_: str, value: Any) -> Any:
            return gather(value, self.mesh, DIM, length) if next(is_part, False) else value

        return self.rewrite(args, kwargs, whole)

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
        with own_stream(self.mesh, moves=False) if func in _DROPOUTS else nullcontext():
            return func(*args, **(kwargs or {}))


_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}
