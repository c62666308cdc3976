"""Bytes that a rank holds between two steps: of parameters, gradients, and optimizer states; and at its peak."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves


class HeldBytes(Callback):
    """Measures at each optimizer step: ``held`` and ``whole``, by ``parameters``, ``gradients``, ``optimizer states``.

    ``held`` are bytes of storage, each counted once, with what pads or surrounds a shard; ``whole`` is what one
    process would hold of the same tensors.

    Args:
        divided: only of DTensors.
    """

    def __init__(self, divided: bool = False) -> None:
        self._divided = divided
        self.held: dict[str, int] = {}
        self.whole: dict[str, int] = {}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Gradients are there now."""
        self._note("gradients", [p.grad for p in pl_module.parameters() if p.grad is not None])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """States are there now, and nothing should be gathered any more."""
        self._note("parameters", list(pl_module.parameters()))
        states = [leaf for optimizer in trainer.optimizers for leaf in tree_leaves(dict(optimizer.state))]
        self._note("optimizer states", [leaf for leaf in states if isinstance(leaf, Tensor)])

    def _note(self, what: str, tensors: list[Tensor]) -> None:
        if self._divided:
            tensors = [t for t in tensors if isinstance(t, DTensor)]
        self.held[what] = storage_bytes(tensors)
        self.whole[what] = sum(t.numel() * t.element_size() for t in tensors)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors (this rank's part of DTensors), each counted once."""
    storages = {}
    for tensor in tensors:
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_memory(run: Callable[[], object]) -> int:
    """Most bytes of the rank's accelerator that a run had allocated at once, beside what was there before."""
    gc.collect()
    torch.accelerator.synchronize()
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    run()
    torch.accelerator.synchronize()
    return torch.accelerator.max_memory_allocated() - before


def most(number: int) -> int:
    """That of the rank which has most. Communication: one gather of a number over the world."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, number)
    return max(everyone)
