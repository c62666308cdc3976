"""Collectives of a step, counted where torch.distributed hands them to the backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAMES = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "reducescatter": "reduce-scatter",
    "alltoall": "all-to-all",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "send": "send",
    "recv": "receive",
}
"""Our names of collectives, by how torch's operators begin without their underscores."""


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called while it is entered, those of DDP's reducer included.

    ``count`` and ``num_bytes`` are by kind, see ``NAMES``. The bytes are those of the whole: what is reduced, the
    gathered tensor (of a functional all-gather this rank's part), the tensor before it is scattered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again as what DTensor makes of it, collectives included
        if func.namespace in ("c10d", "_c10d_functional"):
            self._note(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _note(self, operator: str, args: Iterable[Any]) -> None:
        name = operator.replace("_", "")
        kind = next((kind for start, kind in NAMES.items() if name.startswith(start)), None)
        if kind is None:  # barriers, and operators that wait for a collective
            return
        sizes = [sum(leaf.nbytes for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)) for arg in args]
        self.count[kind] += 1
        self.num_bytes[kind] += max(sizes, default=0)

    def __str__(self) -> str:
        return ", ".join(f"{self.count[k]} {k} ({self.num_bytes[k]:,} B)" for k in sorted(self.count)) or "none"


class StepCollectives(Callback):
    """Counts the collectives of every batch of a fit; ``batches[i]`` are those of batch i."""

    def __init__(self) -> None:
        self.batches: list[Collectives] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Begins to count."""
        self.batches.append(Collectives())
        self.batches[-1].__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Ends to count."""
        self.batches[-1].__exit__(None, None, None)
