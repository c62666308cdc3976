"""Notes of a step that runs over placeholders which ops ran, in which module, and on what."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from lightning_dist.compat.operators import writes_in_place, written_arguments
from lightning_dist.compat.torch import (
    COMPILED_CALL,
    TorchDispatchMode,
    call_uncompiled,
    disable_current_modes,
    memory_of,
)
from lightning_dist.parallel.pipeline.fake_module import FakeModule
from lightning_dist.parallel.pipeline.op_costs import cost_of_op
from lightning_dist.parallel.pipeline.plain_values import number_kind
from lightning_dist.parallel.pipeline.trace import Call, Trace, Value
from lightning_dist.patches import Patches
from lightning_dist.placeholder import is_placeholder, placeholder
from lightning_dist.pytree import deep_map, deep_tensors


class TraceRecorder(TorchDispatchMode):
    """Numbers the ops, and notes which made, changed and last used a tensor that depends on a parameter.

    A placeholder depends on a parameter. So does a real tensor into which a placeholder was written in place, and what
    is computed of it: those are found by their memory.
    """

    def __init__(self, fake_module: FakeModule) -> None:
        super().__init__()
        self.trace = Trace()
        self._fake = fake_module
        fake_module.on_metric = lambda: self.trace.metrics.append(self.trace.num_ops)
        self._stack = [-1]
        self._count: dict[str, int] = {}
        self._written: set[int] = set()
        self._values_by_memory: dict[int, list[Value]] = {}
        self._buffer_names = {id(b): name for name, b in fake_module.module.named_buffers()}
        self._parameters_by_memory: dict[int, list[str]] = {}
        for name, parameter in fake_module.module.named_parameters():
            self._parameters_by_memory.setdefault(memory_of(parameter), []).append(name)
        self._names: dict[int, str] = {}
        self._patches = Patches()
        self._alive: list[Any] = []
        for name, module in fake_module.module.named_modules():
            if name:
                self._names[id(module)] = name
                self._patches.set(module, COMPILED_CALL, partial(self._call, name, module))

    def put_back(self) -> None:
        """Takes the fake module's calls back from the recorder."""
        self._patches.undo()
        self._fake.on_metric = lambda: None

    def add_guard(self, question: Callable[[], Any], answer: Any) -> None:
        """The step has asked something."""
        self.trace.guards.append((question, answer))

    @contextmanager
    def seeing_attributes(self) -> Iterator[None]:
        """While it lasts, numbers are noted that are put into attributes of modules, while a module is called; and what
        is put into attributes of the user's modules goes to the fake ones.

        ``nn.Module.__setattr__`` sees them all; Python has no other place that does.
        """
        plain = nn.Module.__setattr__
        names = {**self._names, id(self._fake.module): ""}

        def seen(module: nn.Module, key: str, value: Any) -> None:
            module = self._fake.copy_of(module)  # a hook may hold the user's own
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

    def _call(self, name: str, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        trace = self.trace
        call = Call(name, self._count.get(name, 0), trace.num_ops, self._stack[-1], recomputed=_is_recomputed())
        self._count[name] = call.ordinal + 1
        self._stack.append(len(trace.calls))
        trace.calls.append(call)
        kept = len(trace.calls), trace.num_ops, dict(self._count)
        try:
            call.output = call_uncompiled(module, *args, **kwargs)
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
        with disable_current_modes(), Patches() as patches:
            state = {name: _random(p) for name, p in module.named_parameters()}
            for inner in module.modules():
                patches.set(inner, COMPILED_CALL, None)
            real = deep_map((args, kwargs), lambda leaf: _random(leaf) if is_placeholder(leaf) else leaf)
            output = torch.func.functional_call(module, state, real[0], real[1])
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
        if self._fake.backwards or (not made and not writes_in_place(func)):
            # what a manual step does after its backward belongs to no stage; what is asked of a tensor (its device,
            # its size) uses nothing of it
            return output
        self._note(inputs, made, cost_of_op(func, args, kwargs, output, inputs, made))
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
            self._values_by_memory.setdefault(memory_of(tensor), []).append(value)
        return value

    def _note(self, inputs: list[Tensor], made: list[Tensor], cost: float) -> None:
        trace, number = self.trace, self.trace.num_ops
        self._alive += inputs
        self._alive += made
        drawn = False
        for tensor in inputs:
            name = self._fake.names.get(id(tensor))
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
            if id(tensor) in self._fake.names:
                continue
            if depends or is_placeholder(tensor):
                if not is_placeholder(tensor):
                    self._written.add(memory_of(tensor))
                self._value(tensor, number)
            elif drawn:
                trace.drawn.setdefault(id(tensor), Value(tensor, number))
        trace.costs.append(cost)
        trace.activation_bytes.append(sum(t.nbytes for t in made if is_placeholder(t)))

    def _note_changes(self, func: Any, args: Any, kwargs: Any) -> None:
        if not writes_in_place(func):
            return
        number = self.trace.num_ops - 1
        depends = any(self._depends(tensor) for tensor in deep_tensors((args, kwargs)))
        for tensor in deep_tensors(written_arguments(func, args, kwargs)):
            self.trace.written.update(self._parameters_by_memory.get(memory_of(tensor), ()))
            if depends and not is_placeholder(tensor):
                self._written.add(memory_of(tensor))
                self._value(tensor, number).used = number
            for value in self._values_by_memory.get(memory_of(tensor), ()):  # a change of a view is one of its base
                value.mutated = number

    def _depends(self, tensor: Tensor) -> bool:
        return is_placeholder(tensor) or (bool(self._written) and memory_of(tensor) in self._written)


def _is_recomputed() -> bool:
    frame: Any = inspect.currentframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


def _random(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, dtype=torch.float32, device=tensor.device).to(tensor.dtype)
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
