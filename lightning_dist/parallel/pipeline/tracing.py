"""Running a step over placeholders to see what it does: which ops ran, in which module, and on what."""

from __future__ import annotations

import inspect
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from lightning_dist.compat.operators import writes_in_place, written_arguments
from lightning_dist.compat.torch import (
    COMPILED_CALL,
    DataDependentOutputException,
    DynamicOutputShapeException,
    TorchDispatchMode,
    UnsupportedOperatorException,
    call_uncompiled,
    disable_current_modes,
    memory_of,
    without_fake_tensor_errors,
)
from lightning_dist.parallel.pipeline.fake_module import FakeModule
from lightning_dist.parallel.pipeline.guards import AddGuard
from lightning_dist.parallel.pipeline.manual_optimization import SEVERAL
from lightning_dist.parallel.pipeline.trace import Call, Trace, Value, cost_of_op, loss_of, number_kind
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
        self._fake, module = fake_module, fake_module.module
        self._stack, self._count = [-1], Counter[str]()
        self._written: set[int] = set()
        self._values_by_memory: dict[int, list[Value]] = defaultdict(list)
        self._buffer_names = {id(b): name for name, b in module.named_buffers()}
        self._parameters_by_memory: dict[int, list[str]] = defaultdict(list)
        for name, parameter in module.named_parameters():
            self._parameters_by_memory[memory_of(parameter)].append(name)
        self._names = {id(child): name for name, child in module.named_modules() if name}
        self.patches = Patches()
        self.patches.set(fake_module, "on_metric", lambda: self.trace.metrics.append(self.trace.num_ops))
        self._alive: list[Any] = []
        for name, child in module.named_modules():
            if name:
                self.patches.set(child, COMPILED_CALL, partial(self._call, name, child))

    def add_guard(self, question: Callable[[], Any], answer: Any) -> None:
        self.trace.guards.append((question, answer))

    @contextmanager
    def seeing_attributes(self) -> Iterator[None]:
        """While it lasts, numbers are noted that are put into attributes of modules, while a module is called; and what
        is put into attributes of the user's modules goes to the fake ones. Python has no other place that sees them
        all.
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

    def _call(self, name: str, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        trace = self.trace
        call = Call(name, self._count[name], trace.num_ops, self._stack[-1], recomputed=_is_recomputed())
        self._count[name] += 1
        self._stack.append(len(trace.calls))
        trace.calls.append(call)
        num_calls, count = len(trace.calls), self._count.copy()
        try:
            call.output = call_uncompiled(module, *args, **kwargs)
        except Exception:  # a value was asked for, or a kernel that runs for real knows no shapes
            # what ran inside stays counted: its cost and parameters are this call's
            del trace.calls[num_calls:]
            self._count = count
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
            self._values_by_memory[memory_of(tensor)].append(value)
        return value

    def _note(self, inputs: list[Tensor], made: list[Tensor], cost: float) -> None:
        trace, number = self.trace, self.trace.num_ops
        self._alive += [*inputs, *made]
        for tensor in inputs:
            self._note_use(tensor, number)
        drawn = any(id(tensor) in trace.drawn for tensor in inputs)
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

    def _note_use(self, tensor: Tensor, number: int) -> None:
        trace, name, buffer = self.trace, self._fake.names.get(id(tensor)), self._buffer_names.get(id(tensor))
        if name is not None:
            trace.parameters.setdefault(name, set()).add(number)
        elif buffer is not None:
            trace.buffers.setdefault(buffer, set()).add(number)
        if name is None and self._depends(tensor):
            self._value(tensor, number)
        for values in (trace.values, trace.drawn):
            if id(tensor) in values:
                values[id(tensor)].used = number

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
    frames = traceback.walk_stack(inspect.currentframe())
    return any(frame.f_code is CheckpointFunction.forward.__code__ for frame, _ in frames)


def _random(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, dtype=torch.float32, device=tensor.device).to(tensor.dtype)
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)


_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


def trace_step(
    fake_module: FakeModule,
    module: pl.LightningModule,
    name: str,
    part: Any,
    rest: tuple[Any, ...] | Callable[[AddGuard], tuple[Any, ...]] = (),
) -> Trace:
    """Runs a step of the fake module once, on a microbatch, without computing what depends on a parameter.

    Args:
        module: whose state the step may ask for.
        rest: the step's other arguments; or what makes them, from what is told of the questions that are asked of them.
    """
    recorder = TraceRecorder(fake_module)
    fake_module.follow(module, recorder.add_guard, in_step=True)
    try:
        with recorder.patches, torch.no_grad(), without_fake_tensor_errors(), recorder.seeing_attributes(), recorder:
            others = rest(recorder.add_guard) if callable(rest) else rest
            recorder.trace.output = getattr(fake_module.module, name)(part, *others)
    except (*_NEEDS_VALUES, RuntimeError) as error:
        recorder.trace.open_end = _value_asked_for(error, name)
    finally:
        recorder.trace.kept = _kept(fake_module.module)
        fake_module.forget_trainer()
    trace = recorder.trace
    for tensor in deep_tensors(loss_of(trace.output)):
        if id(tensor) in trace.values:
            trace.values[id(tensor)].used = trace.num_ops  # at the end, as the loss
    return trace


def _value_asked_for(error: Exception, step: str) -> str:
    """What a step asked of a value, where its trace ends by this error; raises any other error."""
    if isinstance(error, _NEEDS_VALUES):
        return str(error) or type(error).__name__
    if "does not require grad" in str(error):
        raise ValueError(
            f"pp: {step} takes gradients itself (torch.autograd.grad, or backward), through a network of which a rank "
            "has some stages only; use another axis"
        ) from error
    if "numpy() is not supported for tensor subclasses" not in str(error):
        raise error
    return str(error)


def _kept(module: nn.Module) -> list[tuple[str, str, Any, Tensor]]:
    """Tensors without memory in attributes of modules; see :class:`Trace`."""
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


def refuse_manual(module: pl.LightningModule, fake_module: FakeModule, trace: Trace) -> None:
    """Raises a ValueError where a step that optimises by hand, and was traced last, can't be run over microbatches:
    there is not one loss, or the step asks for its value.
    """
    if module.automatic_optimization:
        return
    if trace.open_end:
        raise ValueError(
            f"pp: a training_step that optimises manually, and asks for the value of a tensor ({trace.open_end}), "
            "which is on the last stage only; leave .item() out (self.log takes tensors), or use another axis"
        )
    if fake_module.backwards != 1:
        raise ValueError(SEVERAL.format(number=fake_module.backwards))
