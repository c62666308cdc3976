"""What one run of a step over placeholders has shown: which modules and ops ran, on what, and what they cost."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from lightning_dist.compat.operators import all_overloads, writes_in_place
from lightning_dist.compat.torch import memory_of
from lightning_dist.placeholder import is_placeholder
from lightning_dist.pytree import deep_leaves


@dataclass
class Call:
    """One call of a module in a step.

    Args:
        name: of the module; a module under several names has its first.
        ordinal: how many calls of it came before.
        first: number of the next op when it began.
        last: number of the last op when it returned.
        parent: index of the call inside of which it ran; -1 for the step itself.
        output: what it returned.
        recomputed: whether it ran inside of a reentrant ``torch.utils.checkpoint``, where activations have no graph.
    """

    name: str
    ordinal: int
    first: int
    parent: int
    last: int = -1
    output: Any = None
    recomputed: bool = False

    @cached_property
    def returns_placeholders(self) -> bool:
        """Whether all that it returned are placeholders, and plain values beside them."""
        found = deep_leaves(self.output)
        others = [leaf for leaf in found if not is_placeholder(leaf)]
        plain = (type(None), bool, int, float, str, torch.dtype, torch.device)
        return len(others) < len(found) and all(isinstance(leaf, plain) for leaf in others)


@dataclass
class Value:
    """A tensor that depends on a parameter. ``made`` and ``used`` are numbers of ops."""

    tensor: Tensor
    made: int
    used: int = -1
    mutated: int = -1
    """The last op that changed it in place."""


@dataclass
class Trace:
    """What a step does, op by op.

    Args:
        calls: in the order in which they began.
        costs: of each op, forward and backward, in floating-point operations.
        values: every tensor that depends on a parameter, by id; alive as long as the trace, so ids are unique.
        parameters: ops that use a parameter, by its name.
        draws: ops that drew random numbers.
        drawn: real tensors that were drawn at random, or come of such: made and last used.
        buffers: ops that use a buffer, by its name.
        written: names of the parameters that the step changes in place.
        kept: tensors that modules have as attributes at the end, or in dictionaries there: the module's name, the
            attribute's, the key (None for the attribute itself) and the tensor.
        attributes: numbers that modules have put into attributes while one was called: the module's name and the
            attribute's; when first (the number of the last op), and the type.
        guards: what the step's path hangs on beside the batch: a question to ask again, and the answer.
        metrics: the next ops when a metric was used.
        output: what the step returned; None where it looked at a value and the trace ended.
        open_end: what the step asked of a value, where the trace ended there.
    """

    calls: list[Call] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    values: dict[int, Value] = field(default_factory=dict)
    parameters: dict[str, set[int]] = field(default_factory=dict)
    draws: list[int] = field(default_factory=list)
    drawn: dict[int, Value] = field(default_factory=dict)
    buffers: dict[str, set[int]] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)
    kept: list[tuple[str, str, Any, Tensor]] = field(default_factory=list)
    attributes: dict[tuple[str, str], tuple[int, type]] = field(default_factory=dict)
    guards: list[tuple[Callable[[], Any], Any]] = field(default_factory=list)
    metrics: list[int] = field(default_factory=list)
    output: Any = None
    open_end: str = ""

    @property
    def num_ops(self) -> int:
        return len(self.costs)

    def around(self, index: int) -> Iterator[int]:
        """The calls inside of which a call ran, the innermost first."""
        while (index := self.calls[index].parent) >= 0:
            yield index


def loss_of(output: Any) -> Any:
    """The loss in what a training step returned."""
    return output.get("loss") if isinstance(output, dict) else output


FLOPS_PER_BYTE = {"cpu": 5.0}
"""What reading or writing a byte is taken to cost, in floating-point operations; 100 on an accelerator."""


def cost_of_op(func: Any, args: Any, kwargs: Any, output: Any, inputs: list[Tensor], made: list[Tensor]) -> float:
    """Floating-point operations of an op with its backward: of matrix products, and of the memory that it touches."""
    if not any(is_placeholder(tensor) for tensor in made):
        return 0.0
    is_view = {memory_of(tensor) for tensor in made} <= {memory_of(tensor) for tensor in inputs}
    if is_view and not writes_in_place(func):
        return 0.0
    moved = sum(tensor.nbytes for tensor in {id(t): t for t in (*inputs, *made)}.values())
    flops, packet = 0.0, all_overloads(func)
    if packet in flop_registry:
        with contextlib.suppress(TypeError, AssertionError, AttributeError):
            flops = float(flop_registry[packet](*args, **kwargs, out_val=output))
    # a product has two in its backward; other ops move about as much again
    factor = 3.0 if any(isinstance(leaf, nn.Parameter) for leaf in deep_leaves((args, kwargs))) or flops else 2.0
    cost = factor * flops + 2.0 * FLOPS_PER_BYTE.get(made[0].device.type, 100.0) * moved
    return cost if math.isfinite(cost) else 0.0


def number_kind(value: Any) -> type | None:
    """bool, int or float; None for anything else. Subclasses of int count as int."""
    if isinstance(value, bool):
        return bool
    return int if isinstance(value, int) else float if type(value) is float else None
