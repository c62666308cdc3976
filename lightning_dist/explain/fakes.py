"""A rank without other ranks and without memory: what depends on a parameter has a shape, and no values.

[Note: what is fake]
Parameters are fakes, and so is all that operators make of them, and what is created large. The batch, buffers, and what
is computed of those alone (masks, positions, numbers that ranks agree on) stay real, so code may look at their values.
A collective over fakes does nothing; over real tensors, the fake process group does as if all ranks had the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_dist import module_layout, optimizers
from lightning_dist.compat.fakes import active_fake_mode, converting_fakes
from lightning_dist.compat.operators import READS_A_NUMBER, name_of_operator
from lightning_dist.compat.torch import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    own_parameters,
    tree_map,
)
from lightning_dist.initialization import RecordedInit
from lightning_dist.parallel import ddp
from lightning_dist.parallel.pipeline import microbatch_check
from lightning_dist.parallel.tensor import equivalence
from lightning_dist.patches import Patches
from lightning_dist.placeholder import placeholder
from lightning_dist.pytree import deep_tensors

LARGE = 2**16
"""Bytes from which on a floating tensor that is created of no other is a fake; one without values always is."""


class Fakes(TorchDispatchMode):
    """Keeps what is made of the fakes of a mode fake; see [Note: what is fake]."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        inputs = deep_tensors((args, kwargs))
        modes = {tensor.fake_mode for tensor in inputs if isinstance(tensor, FakeTensor)}
        if not inputs and active_fake_mode() is None:
            return self._created(func, args, kwargs)
        if self._mode not in modes:
            return func(*args, **kwargs)
        if len(modes) > 1:  # with parameters of other stages: it is elsewhere
            args, kwargs = tree_map(self._elsewhere, (args, kwargs))
            return func(*args, **kwargs)
        space, _, name = name_of_operator(func).partition("::")
        if space == "c10d":
            return _returned(func, args, kwargs)
        if name == READS_A_NUMBER:
            return self._read(func, *args)
        if name == "equal":
            return True
        self._mode.cache_enabled = name != "set_"  # what is kept of it holds the memory for good (torch 2.14)
        return func(*args, **kwargs)

    def _created(self, func: Any, args: Any, kwargs: Any) -> Any:
        if torch.device(kwargs.get("device") or "cpu").type == "meta":
            return func(*args, **kwargs)
        with self._mode:
            fake = func(*args, **kwargs)
        if not isinstance(fake, Tensor) or not fake.is_floating_point():
            return func(*args, **kwargs)
        has_values = not fake.numel() or not name_of_operator(func).startswith("aten::empty")
        if fake.nbytes >= LARGE or not has_values:
            return fake
        return func(*args, **kwargs)

    def _elsewhere(self, leaf: Any) -> Any:
        return placeholder(leaf) if isinstance(leaf, FakeTensor) and leaf.fake_mode is self._mode else leaf

    def _read(self, func: Any, tensor: Tensor) -> float:
        """A number of floating point is a loss, a norm or a scale, on which no memory depends; in float64 it is one of
        the flags that stages add to a loss, that something failed."""
        if not tensor.is_floating_point():
            raise DataDependentOutputException(func)
        return 0.0 if tensor.dtype == torch.float64 else 1.0

    def empty(self, size: Any, stride: Any, **kwargs: Any) -> Tensor:
        """A fake."""
        with self._mode:
            return torch.empty_strided(size, stride, **kwargs)

    @torch.no_grad()
    def take(self, module: nn.Module) -> None:
        """Puts fakes in place of a module's parameters; tied ones stay tied. In place."""
        fakes: dict[int, nn.Parameter] = {}
        for child in module.modules():
            for name, p in own_parameters(child).items():
                if p is None or isinstance(p, FakeTensor):
                    continue
                if id(p) not in fakes:
                    fake = self.empty(p.shape, p.stride(), dtype=p.dtype, device=p.device)
                    fakes[id(p)] = nn.Parameter(fake, requires_grad=p.requires_grad)
                    vars(fakes[id(p)]).update(vars(p))
                own_parameters(child)[name] = fakes[id(p)]


def _returned(func: Any, args: Any, kwargs: Any) -> Any:
    """What a collective returns for fakes: what it was given, and that of one which is through."""

    def shown(leaf: Any) -> Any:
        return torch.empty(0) if isinstance(leaf, Tensor) else leaf

    through = func(*tree_map(shown, args), **tree_map(shown, kwargs))
    if not isinstance(through, tuple):
        return through
    return args[0], *through[1:]


@contextmanager
def without_values(fakes: Fakes) -> Iterator[None]:
    """While it lasts, nothing is initialised, and what the product computes twice to compare it is not compared."""

    own: Any = RecordedInit.materialize

    def materialize(recorded: Any, module: Any, take: Any = None, device: Any = None, parameters: bool = True) -> None:
        if parameters:
            recorded.materialize_shapes(module, fakes.empty, device)
        else:
            own(recorded, module, take, device, parameters)

    with Patches() as patches, converting_fakes():
        patches.also(partial(setattr, RecordedInit, "materialize", own))
        setattr(RecordedInit, "materialize", materialize)  # noqa: B010
        patches.set(optimizers, "validate_exact", lambda *_: None)
        patches.set(module_layout, "make_copies_equal", lambda *_: None)
        patches.set(ddp, "allreduce_hook", _reduced)
        patches.set(microbatch_check, "compare", lambda *_: "")
        patches.set(equivalence, "refuse_differences", lambda *_: None)
        yield


def _reduced(_group: Any, bucket: Any) -> Any:
    done: Any = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
