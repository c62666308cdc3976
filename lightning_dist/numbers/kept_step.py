"""What a training step begins from, to compute it again; and whether two numbers of it are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dist.compat.torch import DisableTorchFunctionSubclass
from lightning_dist.dtensors import local_part
from lightning_dist.numbers.digests import LocalGradients
from lightning_dist.parallel.rehearsal import undo_of
from lightning_dist.placeholder import is_placeholder
from lightning_dist.random_states import RandomStates

ROUNDING = 1e-3
"""Of the largest value of a tensor: by how much numbers may differ where kernels are not deterministic."""


@dataclass(frozen=True)
class Microstep:
    """One call of ``training_step``, to be made again; ``weight`` is what its loss counts beside others."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: RandomStates
    weight: float


@dataclass
class Before:
    """What a step began from.

    Args:
        undo: puts the module's state back.
        gradients: that nobody zeroes, with copies of them.
        own: sees the gradients before they are reduced.
    """

    undo: Callable[[], None]
    gradients: list[tuple[nn.Parameter, Tensor]]
    own: LocalGradients
    loss: Tensor | None = None


def undo_of_step(module: nn.Module) -> Callable[[], None]:
    """What puts back all that a step changes in a module, to how it is now: as :func:`undo_of` does, and the generators
    and plain tensors that modules have as attributes.
    """
    undo = undo_of(module)
    values = [value for part in module.modules() for value in vars(part).values()]
    generators = [(value, value.get_state()) for value in values if isinstance(value, torch.Generator)]
    plain = [t for t in values if isinstance(t, Tensor) and not (t.requires_grad or t.is_inference())]
    tensors = [(t, t.detach().clone()) for t in plain if not is_placeholder(t)]

    def undo_all() -> None:
        undo()
        for generator, state in generators:
            generator.set_state(state)
        with torch.no_grad():
            for tensor, before in tensors:
                if not torch.equal(tensor, before):
                    tensor.copy_(before)

    return undo_all


def is_close(one: Tensor, other: Tensor) -> bool:
    """Whether what this rank holds of two tensors is the same within :data:`ROUNDING`; waits for the device."""
    with DisableTorchFunctionSubclass():
        one, other = (part.to_dense() if part.is_sparse else part for part in (local_part(one), local_part(other)))
        if not other.numel():
            return True
        largest = other.abs().nan_to_num(0.0, 0.0).max()
        same = (one == other) | (one.isnan() & other.isnan()) | ((one - other).abs() <= ROUNDING * largest)
        return bool(same.all())
