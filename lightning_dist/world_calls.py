"""A user's own collectives over the world, where it holds each sample several times: refused, or told of once.

[Note: who calls]
The ranks of ``tp`` and ``pp`` see the same samples, so what a step gathers from the world holds each of them several
times. All functions of torch.distributed, however they were imported, ask one private function about their group; while
a Trainer runs, that one also looks at who called. What torch, Lightning, torchmetrics and this package call is theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.distributed import distributed_c10d

from lightning_dist.compat.distributed import RANK_NOT_IN_GROUP
from lightning_dist.layout import Layout
from lightning_dist.patches import Patches

GATHERS = frozenset(
    [
        *("all_gather", "all_gather_single", "all_gather_coalesced", "all_gather_object"),
        *("gather", "gather_single", "gather_object"),
        *("reduce_scatter", "reduce_scatter_single", "all_to_all", "all_to_all_single"),
    ]
)
"""Functions whose result has a piece for each rank."""

SUMS = frozenset(["all_reduce", "all_reduce_coalesced", "reduce"])
PLACES = frozenset(["get_rank", "get_world_size"])

_BETWEEN = (
    *("torch.distributed.distributed_c10d", "torch.distributed.c10d_logger", "torch.distributed.nn.functional"),
    *("torch.autograd.function", "typing_extensions", "functools", "contextlib"),
)
"""Modules that lie between a caller and the question about the group (seen in torch 2.14)."""

_OTHERS = frozenset(
    ["torch", "torchmetrics", "lightning", "lightning_fabric", "pytorch_lightning", __name__.partition(".")[0]]
)


class WorldCalls:
    """Looks at collectives over the world while it is attached; see [Note: who calls].

    Args:
        layout: under which several ranks see the same samples.

    Communication: none.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._in_step = False
        self._gathered = False
        self._read: set[str] = set()
        self._told: set[str] = set()

    def attach(self, patches: Patches) -> None:
        """Begins, for this process, until an undo."""
        patches.wrap(distributed_c10d, RANK_NOT_IN_GROUP, self._ask)

    @contextmanager
    def of_step(self) -> Iterator[None]:
        """While a step runs, gathers are refused, not told of."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    def note_gather(self) -> None:
        """Called when a step gathers from the ranks with different samples: its own place there may be asked next."""
        self._gathered = self._gathered or self._in_step
        self._tell_of_places()

    def note_place(self, name: str) -> None:
        """Called when somebody reads the strategy's ``global_rank`` or ``world_size``."""
        caller: FrameType | None = sys._getframe(2)
        while caller is not None and caller.f_code.co_name == name:  # of the module, of the trainer
            caller = caller.f_back
        if caller is None or _module(caller).partition(".")[0] in _OTHERS:
            return
        if self._in_step or name == "world_size":
            self._read.add(name)
            self._tell_of_places()

    def _tell_of_places(self) -> None:
        """A rank compared with 0 is nobody's place: it matters where something is gathered."""
        for name in sorted(self._read - self._told):
            if name == "world_size" or self._gathered:
                self._told.add(name)
                rank_zero_warn(f"{name} {self._why()} {_WEIGHED[1]}")

    def _ask(self, original: Callable[[Any], bool], group: Any) -> bool:
        if group is None or group is dist.group.WORLD:
            self._look(sys._getframe(1))
        return original(group)

    def _look(self, asked: FrameType) -> None:
        name = asked.f_code.co_name
        if name not in GATHERS and name not in SUMS and name not in PLACES:
            return
        if name in SUMS and asked.f_locals.get("op") not in (dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT):
            return
        caller: FrameType | None = asked
        while caller is not None and _module(caller) in _BETWEEN:
            if name in PLACES and _module(caller).endswith("nn.functional"):
                return
            caller = caller.f_back
        if caller is None or _module(caller).partition(".")[0] in _OTHERS:
            return
        if name in GATHERS and self._in_step:
            raise ValueError(f"{self._what(name)} {_INSTEAD}")
        if name not in self._told:
            self._told.add(name)
            rank_zero_warn(f"{self._what(name)} {_INSTEAD if name in GATHERS else _WEIGHED[name in PLACES]}")

    def _what(self, name: str) -> str:
        return f"torch.distributed.{name} over all ranks {self._why()}"

    def _why(self) -> str:
        axes = [f"{axis}={degree}" for axis, degree in self._layout.items() if axis in _COPYING and degree > 1]
        copies = self._layout.world_size // self._layout.num_data_ranks
        return (
            f"under layout {self._layout}: the ranks of {' and '.join(axes)} see the same samples, so each sample is "
            f"there {copies} times."
        )


_COPYING = ("tp", "pp", "cp")
_INSTEAD = (
    "Use self.all_gather, which gathers every sample once, or pass group=trainer.strategy.data_group, whose size and "
    "own place are trainer.strategy.num_data_ranks and data_rank"
)
_WEIGHED = (
    "A mean over the ranks is right, a sum counts each sample as often: use trainer.strategy.reduce, or pass "
    "group=trainer.strategy.data_group",
    "To count or find samples, take trainer.strategy.num_data_ranks and data_rank",
)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
