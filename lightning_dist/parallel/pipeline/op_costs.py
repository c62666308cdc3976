"""What an op of a step costs, by which stages are balanced."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from lightning_dist.compat.operators import all_overloads, writes_in_place
from lightning_dist.compat.torch import memory_of
from lightning_dist.placeholder import is_placeholder
from lightning_dist.pytree import deep_leaves

FLOPS_PER_BYTE = {"cpu": 5.0}
"""What reading or writing a byte is taken to cost, in floating-point operations; 100 on an accelerator."""


def cost_of_op(func: Any, args: Any, kwargs: Any, output: Any, inputs: list[Tensor], made: list[Tensor]) -> float:
    """Floating-point operations of an op with its backward: of matrix products, and of the memory that it touches."""
    if not any(is_placeholder(tensor) for tensor in made):
        return 0.0
    is_view = {memory_of(tensor) for tensor in made} <= {memory_of(tensor) for tensor in inputs}
    if is_view and not writes_in_place(func):
        return 0.0
    device = made[0].device.type
    moved = sum(tensor.nbytes for tensor in {id(t): t for t in (*inputs, *made)}.values())
    flops = 0.0
    packet = all_overloads(func)
    if packet in flop_registry:
        try:
            flops = float(flop_registry[packet](*args, **kwargs, out_val=output))
        except (TypeError, AssertionError, AttributeError):
            flops = 0.0
    # a product has two in its backward; other ops move about as much again
    factor = 3.0 if any(isinstance(leaf, nn.Parameter) for leaf in deep_leaves((args, kwargs))) or flops else 2.0
    cost = factor * flops + 2.0 * FLOPS_PER_BYTE.get(device, 100.0) * moved
    return cost if math.isfinite(cost) else 0.0
