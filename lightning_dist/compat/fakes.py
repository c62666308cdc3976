"""Private names of torch for runs without memory and without other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_dist.compat.names import hands_on, uses

hands_on(
    {
        "torch._guards.active_fake_mode": "tells that DTensor infers shapes by fakes of its own",
        "torch.testing._internal.distributed.fake_pg.FakeStore": "stands for a store over which ranks met",
    }
)
COMMUNICATE = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "fsdp", "_dtensor")
"""Namespaces of operators that communicate, and of fully_shard's copies into and out of what they send."""

__all__ = ["COMMUNICATE", "active_fake_mode", "converting_fakes", "form_fake_world"]


@uses("torch.testing._internal.distributed.fake_pg")
def form_fake_world(rank: int, world_size: int) -> None:
    """Makes the process group of a world in which this process is alone, and every collective returns at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


@uses("torch.nn.Module._apply", "torch.nn.Module._parameters")
@contextmanager
def converting_fakes() -> Iterator[None]:
    """While it lasts, ``module.to`` works on parameters without memory, which torch would swap, and can't (2.14)."""
    own: Any = nn.Module._apply

    def apply(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
        there: dict[str, Any] = module._parameters
        fakes = {name: p for name, p in there.items() if isinstance(p, FakeTensor)}
        there.update(dict.fromkeys(fakes))
        own(module, function, recurse)
        for name, p in fakes.items():
            with torch.no_grad():
                converted = function(p)
            there[name] = p if converted is p else nn.Parameter(converted, requires_grad=p.requires_grad)
        return module

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = own  # type: ignore[method-assign]
