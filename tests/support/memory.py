"""Memory: of large tensors, counted as their storages come and go, and of this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_dist.compat.torch import FakeTensor, memory_of


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were made while it was entered, of at least a size, and that are still there.

    Args:
        least: bytes of a storage that counts.
    """

    def __init__(self, least: int) -> None:
        super().__init__()
        self._least, self.peak = least, 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {memory_of(leaf) for leaf in tree_leaves((args, kwargs)) if _has_memory(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _has_memory(leaf) and (key := memory_of(leaf)) not in given:
                storage = leaf.untyped_storage()
                if storage.nbytes() >= self._least:
                    self._live[key] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def _has_memory(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and type(leaf) in (Tensor, torch.nn.Parameter) and not isinstance(leaf, FakeTensor)


def resident_bytes() -> int:
    """Of this process: anonymous memory, and that of mapped files. Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon", "RssFile")))
