"""A GPU that is not there: what a program would keep on it, by FakeTensorMode, and how much of it at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_dist import Layout, placeholder, validation
from lightning_dist.ranks import LayoutRanks

GPU = torch.device("cuda", 0)


class DeviceMemory(TorchDispatchMode):
    """Bytes of the tensors on a device, ``now``, and the most that there were at once, ``peak``."""

    def __init__(self, device: torch.device = GPU) -> None:
        super().__init__()
        self._device, self._sizes = device, dict[Any, int]()
        self.now = self.peak = 0

    def _free(self, storage: Any) -> None:
        self.now -= self._sizes.pop(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor) and leaf.device == self._device:
                storage = leaf.untyped_storage()
                if (reference := weakref.ref(storage, self._free)) not in self._sizes:
                    self._sizes[reference] = storage.nbytes()
                    self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result


class _DataMoves(TorchFunctionMode):
    """``p.data = p.to(device)``, after which a fake p would say that it is where it was (torch 2.14)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func == Tensor.data.__set__ and isinstance(args[0], FakeTensor):  # type: ignore[attr-defined]
            args[0].fake_device = args[1].fake_device
        return result


@contextmanager
def a_rank_with_a_gpu(monkeypatch: pytest.MonkeyPatch, layout: str) -> Iterator[tuple[LayoutRanks, DeviceMemory]]:
    """The first rank of a layout whose other ranks are not there; tensors have no memory, and may be on a GPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(placeholder, "FakeTensor", type("OfAnotherStage", (), {}))  # there are none
    monkeypatch.setattr(validation, "validate_parameter_kinds", lambda *_: None)  # which refuses other classes
    # for what is moved, ``Module.to`` swaps fake parameters, and sets the data of others
    monkeypatch.setattr(torch.utils, "swap_tensors", lambda one, other: setattr(one, "data", other))
    ranks = LayoutRanks(Layout.parse(layout))
    assert ranks.requested is not None
    ranks.layout, ranks.world_size, ranks.device = ranks.requested, ranks.requested.world_size, GPU
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks.world_size)
    try:
        ranks.form_mesh()
        with FakeTensorMode(), _DataMoves(), DeviceMemory() as memory:
            yield ranks, memory
    finally:
        dist.destroy_process_group()
