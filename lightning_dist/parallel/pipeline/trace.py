"""One run of a step over placeholders: which ops ran, in which module, on what, and what they cost."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.flop_counter import flop_registry

from lightning_dist.parallel.pipeline.asked import Note
from lightning_dist.parallel.pipeline.nested import number_kind
from lightning_dist.parallel.pipeline.skeleton import Skeleton
from lightning_dist.placeholder import is_placeholder, placeholder
from lightning_dist.pytree import deep_leaves, deep_map, deep_tensors

FLOPS_PER_BYTE = {"cpu": 5.0}
"""What reading or writing a byte is taken to cost, in floating-point operations; 100 on an accelerator."""

_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


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
        plain = (type(None), bool, int, float, str, torch.dtype, torch.device)
        return any(is_placeholder(leaf) for leaf in found) and all(
            is_placeholder(leaf) or isinstance(leaf, plain) for leaf in found
        )


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
        asked: what the step's path may hang on beside the batch: a question to ask again, and the answer.
        metrics: the next ops when a metric was used.
        activation_bytes: what each op made.
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
    asked: list[tuple[Callable[[], Any], Any]] = field(default_factory=list)
    metrics: list[int] = field(default_factory=list)
    activation_bytes: list[int] = field(default_factory=list)
    output: Any = None
    open_end: str = ""

    @property
    def num_ops(self) -> int:
        """Ops of the whole step."""
        return len(self.costs)


def trace_step(
    skeleton: Skeleton,
    module: pl.LightningModule,
    name: str,
    part: Any,
    rest: tuple[Any, ...] | Callable[[Note], tuple[Any, ...]] = (),
) -> Trace:
    """Runs a step of the skeleton once, without computing what depends on a parameter.

    Args:
        skeleton: of the module.
        module: whose state the step may ask for.
        name: of the step.
        part: a microbatch.
        rest: the step's other arguments; or what makes them, from what is told of the questions that are asked of them.

    Returns:
        What ran.
    """
    recorder = _Recorder(skeleton)
    skeleton.follow(module, recorder.note, in_step=True)
    errors = logging.getLogger("torch._subclasses.fake_tensor")  # of what is tried again for real
    was_disabled, errors.disabled = errors.disabled, True
    try:
        with torch.no_grad(), recorder.seeing_attributes(), recorder:
            others = rest(recorder.note) if callable(rest) else rest
            recorder.trace.output = getattr(skeleton.module, name)(part, *others)
    except _NEEDS_VALUES as error:
        recorder.trace.open_end = str(error) or type(error).__name__
    except RuntimeError as error:
        if "does not require grad" in str(error):
            raise ValueError(
                f"pp: {name} takes gradients itself (torch.autograd.grad, or backward), through a network of which a "
                "rank has some stages only; use another axis"
            ) from error
        if "numpy() is not supported for tensor subclasses" not in str(error):
            raise
        recorder.trace.open_end = str(error)
    finally:
        errors.disabled = was_disabled
        recorder.put_back()
        recorder.trace.kept = _kept(skeleton.module)
        vars(skeleton.module)["_trainer"] = None
    _settle_end(recorder.trace)
    return recorder.trace


def _kept(module: nn.Module) -> list[tuple[str, str, Any, Tensor]]:
    found: list[tuple[str, str, Any, Tensor]] = []
    for name, child in module.named_modules():
        for key, value in vars(child).items():
            if key.startswith("_"):
                continue
            if is_placeholder(value):
                found.append((name, key, None, value))
            elif type(value) is dict:
                found += [(name, key, inner, item) for inner, item in value.items() if is_placeholder(item)]
    return found


def loss_of(output: Any) -> Any:
    """The loss in what a training step returned."""
    return output.get("loss") if isinstance(output, dict) else output


def _settle_end(trace: Trace) -> None:
    """What is returned as the loss is used at the end."""
    for tensor in deep_tensors(loss_of(trace.output)):
        if id(tensor) in trace.values:
            trace.values[id(tensor)].used = trace.num_ops


class _Recorder(TorchDispatchMode):
    """Numbers the ops, and notes which made, changed and last used a tensor that depends on a parameter.

    A placeholder depends on a parameter. So does a real tensor into which a placeholder was written in place, and what
    is computed of it: those are found by their memory.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        super().__init__()
        self.trace = Trace()
        self._skeleton = skeleton
        skeleton.on_metric = lambda: self.trace.metrics.append(self.trace.num_ops)
        self._stack = [-1]
        self._count: dict[str, int] = {}
        self._written: set[int] = set()
        self._values_by_memory: dict[int, list[Value]] = {}
        self._buffer_names = {id(b): name for name, b in skeleton.module.named_buffers()}
        self._parameters_by_memory: dict[int, list[str]] = {}
        for name, parameter in skeleton.module.named_parameters():
            self._parameters_by_memory.setdefault(_memory(parameter), []).append(name)
        self._names: dict[int, str] = {}
        self._alive: list[Any] = []
        for name, module in skeleton.module.named_modules():
            if name:
                self._names[id(module)] = name
                module.__dict__["_compiled_call_impl"] = _Traced(self, name, module)

    def put_back(self) -> None:
        for module in self._skeleton.module.modules():
            module.__dict__.pop("_compiled_call_impl", None)
        self._skeleton.on_metric = lambda: None

    def note(self, question: Callable[[], Any], answer: Any) -> None:
        """The step has asked something."""
        self.trace.asked.append((question, answer))

    @contextmanager
    def seeing_attributes(self) -> Iterator[None]:
        """While it lasts, numbers are noted that are put into attributes of modules, while a module is called; and what
        is put into attributes of the user's modules goes to the skeleton's.

        ``nn.Module.__setattr__`` sees them all; Python has no other place that does.
        """
        plain = nn.Module.__setattr__
        names = {**self._names, id(self._skeleton.module): ""}

        def seen(module: nn.Module, key: str, value: Any) -> None:
            module = self._skeleton.copy_of(module)  # a hook may hold the user's own
            plain(module, key, value)
            kind = number_kind(value)
            if kind is not None and self._stack[-1] >= 0 and id(module) in names:
                self.trace.attributes.setdefault((names[id(module)], key), (self.trace.num_ops - 1, kind))

        nn.Module.__setattr__ = seen  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.__setattr__ = plain  # type: ignore[method-assign]

    # ------------------------------------------------------------------ modules

    def call(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        trace = self.trace
        call = Call(name, self._count.get(name, 0), trace.num_ops, self._stack[-1], recomputed=_is_recomputed())
        self._count[name] = call.ordinal + 1
        self._stack.append(len(trace.calls))
        trace.calls.append(call)
        kept = len(trace.calls), trace.num_ops, dict(self._count)
        try:
            call.output = module._call_impl(*args, **kwargs)
        except Exception:  # a value was asked for, or a kernel that runs for real knows no shapes
            # what ran inside stays counted: its cost and parameters are this call's
            del trace.calls[kept[0] :]
            self._count = {**kept[2], name: call.ordinal + 1}
            call.output = self._run_for_real(module, args, kwargs)
        finally:
            self._stack.pop()
        call.last = trace.num_ops - 1
        return call.output

    def _run_for_real(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The shapes of a module's outputs where its Python looks at values: of a run on random ones."""
        with _disable_current_modes():
            state = {name: _random(p) for name, p in module.named_parameters()}
            inner = [m for m in module.modules() if "_compiled_call_impl" in vars(m)]
            traced = [vars(m).pop("_compiled_call_impl") for m in inner]
            try:
                real = deep_map((args, kwargs), lambda leaf: _random(leaf) if is_placeholder(leaf) else leaf)
                output = torch.func.functional_call(module, state, real[0], real[1])
            finally:
                for m, before in zip(inner, traced, strict=True):
                    vars(m)["_compiled_call_impl"] = before
        output = deep_map(output, lambda leaf: placeholder(leaf) if isinstance(leaf, Tensor) else leaf)
        used = [*deep_tensors((args, kwargs)), *module.parameters()]
        self._note(used, deep_tensors(output), 3.0 * sum(p.numel() for p in module.parameters()))
        return output

    # ------------------------------------------------------------------ ops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = deep_tensors((args, kwargs))
        output = func(*args, **kwargs)
        made = deep_tensors(output)
        if self._skeleton.backwards or (not made and not func._schema.is_mutable):
            # what a manual step does after its backward belongs to no stage; what is asked of a tensor (its device,
            # its size) uses nothing of it
            return output
        self._note(inputs, made, _cost(func, args, kwargs, output, inputs, made))
        self._note_changes(func, args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.trace.draws.append(self.trace.num_ops - 1)
            for tensor in made:
                if not is_placeholder(tensor):
                    self.trace.drawn[id(tensor)] = Value(tensor, self.trace.num_ops - 1)
        return output

    def _value(self, tensor: Tensor, number: int) -> Value:
        value = self.trace.values.get(id(tensor))
        if value is None:
            value = self.trace.values[id(tensor)] = Value(tensor, number)
            self._values_by_memory.setdefault(_memory(tensor), []).append(value)
        return value

    def _note(self, inputs: list[Tensor], made: list[Tensor], cost: float) -> None:
        trace, number = self.trace, self.trace.num_ops
        self._alive += inputs
        self._alive += made
        drawn = False
        for tensor in inputs:
            name = self._skeleton.names.get(id(tensor))
            if name is not None:
                trace.parameters.setdefault(name, set()).add(number)
            elif id(tensor) in self._buffer_names:
                trace.buffers.setdefault(self._buffer_names[id(tensor)], set()).add(number)
            value = trace.values.get(id(tensor))
            if value is None and name is None and self._depends(tensor):
                value = self._value(tensor, number)
            if value is not None:
                value.used = number
            if id(tensor) in trace.drawn:
                trace.drawn[id(tensor)].used = number
                drawn = True
        depends = any(self._depends(tensor) for tensor in inputs)
        for tensor in made:
            if id(tensor) in self._skeleton.names:
                continue
            if depends or is_placeholder(tensor):
                if not is_placeholder(tensor):
                    self._written.add(_memory(tensor))
                self._value(tensor, number)
            elif drawn:
                trace.drawn.setdefault(id(tensor), Value(tensor, number))
        trace.costs.append(cost)
        trace.activation_bytes.append(sum(t.nbytes for t in made if is_placeholder(t)))

    def _note_changes(self, func: Any, args: Any, kwargs: Any) -> None:
        if not func._schema.is_mutable:
            return
        number = self.trace.num_ops - 1
        depends = any(self._depends(tensor) for tensor in deep_tensors((args, kwargs)))
        given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
        for argument in func._schema.arguments:
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in deep_tensors(given.get(argument.name)):
                for name in self._parameters_by_memory.get(_memory(tensor), ()):
                    self.trace.written.add(name)
                if depends and not is_placeholder(tensor):
                    self._written.add(_memory(tensor))
                    self._value(tensor, number).used = number
                for value in self._values_by_memory.get(_memory(tensor), ()):  # a change of a view is one of its base
                    value.mutated = number

    def _depends(self, tensor: Tensor) -> bool:
        return is_placeholder(tensor) or (bool(self._written) and _memory(tensor) in self._written)


class _Traced:
    """Stands before a module's call; torch asks for it as it does for a compiled one."""

    def __init__(self, recorder: _Recorder, name: str, module: nn.Module) -> None:
        self._recorder, self._name, self._module = recorder, name, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._recorder.call(self._name, self._module, args, kwargs)


def _is_recomputed() -> bool:
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _random(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, dtype=torch.float32, device=tensor.device).to(tensor.dtype)
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _cost(func: Any, args: Any, kwargs: Any, output: Any, inputs: list[Tensor], made: list[Tensor]) -> float:
    """Floating-point operations of an op with its backward: of matrix products, and of the memory that it touches."""
    if not any(is_placeholder(tensor) for tensor in made):
        return 0.0
    is_view = {_memory(tensor) for tensor in made} <= {_memory(tensor) for tensor in inputs}
    if is_view and not func._schema.is_mutable:
        return 0.0
    device = made[0].device.type
    moved = sum(tensor.nbytes for tensor in {id(t): t for t in (*inputs, *made)}.values())
    flops = 0.0
    if func._overloadpacket in flop_registry:
        try:
            flops = float(flop_registry[func._overloadpacket](*args, **kwargs, out_val=output))
        except (TypeError, AssertionError, AttributeError):
            flops = 0.0
    # a product has two in its backward; other ops move about as much again
    factor = 3.0 if any(isinstance(leaf, nn.Parameter) for leaf in deep_leaves((args, kwargs))) or flops else 2.0
    cost = factor * flops + 2.0 * FLOPS_PER_BYTE.get(device, 100.0) * moved
    return cost if math.isfinite(cost) else 0.0
