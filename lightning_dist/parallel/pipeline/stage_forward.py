"""A stage: the user's own step, entered at one cut and left at the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor, nn

from lightning_dist.compat.torch import COMPILED_CALL, call_of
from lightning_dist.parallel.pipeline.boundary_numbers import NumberSlot, decoded, encoded
from lightning_dist.parallel.pipeline.plain_values import number_kind
from lightning_dist.parallel.pipeline.split_points import BoundaryTensor, SplitPoint, skipped_calls
from lightning_dist.parallel.pipeline.trace import Trace
from lightning_dist.patches import Patches
from lightning_dist.placeholder import is_placeholder
from lightning_dist.pytree import deep_leaves, deep_map, deep_tensors


class StageExit(BaseException):
    """Passes through the user's step once the stage has its output; no ``except Exception`` catches it."""


class StageForward:
    """How one stage runs a step on batches of the shape that was traced.

    The step is called on every stage. Before the entry, modules return what the trace recorded, tensors without memory,
    and the step's Python between them runs on those, which costs almost nothing. The module at the entry returns what
    was received, and from there everything is real. A call of the module at the exit raises, through the step.

    Hooks of modules that are skipped or entered don't run: they ran on the stage that owns them.

    Args:
        trace: of the step.
        entry: the split point at which the stage begins; None for the first.
        exit: the split point at which it ends; None for the last.
    """

    def __init__(self, trace: Trace, entry: SplitPoint | None, exit: SplitPoint | None) -> None:
        self.entry, self.exit = entry, exit
        self.skipped = skipped_calls(trace, entry) if entry is not None else {}
        """What calls return that the stage skips: by the module's name and the call's number."""
        self.inside = _calls_inside(trace)
        received = {id(c.tensor) for c in entry.boundary} if entry is not None else set()
        self.kept = [kept for kept in trace.kept if id(kept[3]) in received]
        """What modules that are skipped, or their hooks, have put into attributes, and the step reads later."""
        self.entered_output: Any = None if entry is None else trace.calls[entry.call].output
        self.captured = self._calls_to_capture(trace)
        """Boundary tensors of the exit that other calls than the last one return, by those."""
        outputs = {(call.name, call.ordinal): deep_leaves(call.output) for call in trace.calls}
        numbers = () if exit is None else [(slot.name, slot.key) for slot in exit.numbers if slot.place >= 0]
        self.returned: dict[tuple[str, int], list[Any]] = {key: outputs[key] for key in numbers}
        """The leaves that calls returned in the trace, where later stages take numbers of them."""
        self.sees_metrics = entry is not None and any(op <= entry.after for op in trace.metrics)
        """Whether the step uses metrics before the entry."""
        watched = {*self.skipped, *(name for name, _ in self.captured), *(name for name, _ in self.returned)}
        self.watched = watched | {point.name for point in (entry, exit) if point is not None}
        """Names of the modules whose calls the stage has to see."""

    def _calls_to_capture(self, trace: Trace) -> dict[tuple[str, int], list[BoundaryTensor]]:
        captured: dict[tuple[str, int], list[BoundaryTensor]] = {}
        begin, after = (-1, -1) if self.entry is None else (self.entry.call, self.entry.after)
        for item in () if self.exit is None else self.exit.boundary:
            if item.call < 0:
                continue
            call = trace.calls[item.call]
            if self.entry is None or (item.call != begin and call.last > after):
                captured.setdefault((call.name, call.ordinal), []).append(item)
        return captured

    def run(
        self, module: nn.Module, step: Callable[[], Any], received: list[Tensor], on_enter: Callable[[], None]
    ) -> tuple[list[Tensor], Any]:
        """Runs the step from the entry to the exit.

        Args:
            module: whose step it is.
            step: the user's, with a batch of the traced shape.
            received: the tensors of the entry's cut, in its order.
            on_enter: called when everything before the entry has run.

        Returns:
            The tensors of the exit's cut and None; or, on the last stage, nothing and what the step returned.

        Raises:
            RuntimeError: the step did not pass the entry or the exit as it did when it was traced.
        """
        run = _MicrobatchInStage(self, received, on_enter)
        with run.watching(module):
            try:
                output = step()
            except StageExit:
                return run.sent(), None
        if not run.entered or self.exit is not None:
            missed = self.exit if run.entered else self.entry
            assert missed is not None
            raise RuntimeError(
                f"pp: this step did not call {missed.label!r}, where the network is cut; it did on the first batch of "
                "this shape. A step whose path depends on values can't be cut there: name other pipeline_cuts"
            )
        return [], output


class RecordedForward:
    """A step whose modules return what was recorded of them; what it does beside is real.

    Args:
        trace: of the step.
    """

    def __init__(self, trace: Trace) -> None:
        self._returned: dict[tuple[str, int], Any] = {}
        inside: set[int] = set()
        for index, call in enumerate(trace.calls):
            if call.parent in inside or (call.last >= 0 and call.returns_placeholders):
                inside.add(index)
                if call.parent not in inside:
                    self._returned[call.name, call.ordinal] = call.output
        self._inside = _calls_inside(trace)

    def run(self, module: nn.Module, step: Callable[[], Any]) -> None:
        """Runs the step."""
        counts: Counter[str] = Counter()

        def call(name: str, original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            key = name, counts[name]
            counts[name] += 1
            if key not in self._returned:
                return original(*args, **kwargs)
            counts.update(self._inside.get(key, {}))
            return self._returned[key]

        with _wrapped_calls(module, {name for name, _ in self._returned}, call):
            step()


@contextmanager
def _wrapped_calls(module: nn.Module, names: Iterable[str], call: Callable[..., Any]) -> Iterator[None]:
    """While it lasts, ``call(name, original, *args, **kwargs)`` runs in place of the calls of these modules."""
    with Patches() as patches:
        for name in names:
            child = module.get_submodule(name)
            patches.set(child, COMPILED_CALL, partial(call, name, call_of(child)))
        yield


class _MicrobatchInStage:
    """One microbatch on its way through a stage."""

    def __init__(self, forward: StageForward, received: list[Tensor], on_enter: Callable[[], None]) -> None:
        self._forward, self._on_enter = forward, on_enter
        self._module: nn.Module | None = None
        self.entered = forward.entry is None
        self._counts: Counter[str] = Counter()
        boundary = forward.entry.boundary if forward.entry is not None else ()
        self._known: dict[int, Tensor] = {id(item.tensor): t for item, t in zip(boundary, received, strict=True)}
        self._numbers: dict[NumberSlot, Any] = {}
        if forward.entry is not None and forward.entry.numbers:
            self._numbers = decoded(forward.entry.numbers, received[-1])

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Wraps the calls of the modules that the stage has to see."""
        self._module = module
        with _wrapped_calls(module, self._forward.watched, self._call):
            yield

    def _call(self, name: str, original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        forward, ordinal = self._forward, self._counts[name]
        self._counts[name] += 1
        if not self.entered:
            entry = forward.entry
            assert entry is not None
            if (name, ordinal) == (entry.name, entry.ordinal):
                self._counts.update(forward.inside.get((name, ordinal), {}))
                self.entered = True
                self._on_enter()
                self._keep()
                return self._received(forward.entered_output, name, ordinal)
            if ordinal in forward.skipped.get(name, {}):
                self._counts.update(forward.inside.get((name, ordinal), {}))
                return self._received(forward.skipped[name][ordinal], name, ordinal)
        output = original(*args, **kwargs)
        if (name, ordinal) in forward.returned:
            self._note_numbers(name, ordinal, deep_leaves(output))
        for item in forward.captured.get((name, ordinal), ()):
            self._known[id(item.tensor)] = deep_tensors(output)[item.place]
        exit = forward.exit
        if exit is not None and (name, ordinal) == (exit.name, exit.ordinal):
            raise StageExit
        return output

    def _keep(self) -> None:
        """Attributes as the modules that this stage skips have left them."""
        assert self._module is not None
        for name, attribute, key, tensor in self._forward.kept:
            owner = vars(self._module.get_submodule(name))
            if key is None:
                owner[attribute] = self._known[id(tensor)]
            else:
                owner.setdefault(attribute, {})[key] = self._known[id(tensor)]

        for slot, value in self._numbers.items():
            if slot.place < 0:
                setattr(self._module.get_submodule(slot.name), str(slot.key), value)

    def _note_numbers(self, name: str, ordinal: int, found: list[Any]) -> None:
        expected = self._forward.returned[name, ordinal]
        if list(map(_kind, found)) != list(map(_kind, expected)):
            raise RuntimeError(
                f"pp: {name!r} returned {len(found)} values of other kinds than the {len(expected)} of the first batch "
                "of this shape, which later stages expect; name pipeline_cuts before that module"
            )
        for place, leaf in enumerate(found):
            kind = number_kind(leaf)
            if kind is not None:
                self._numbers[NumberSlot(name, ordinal, place, kind)] = leaf

    def _received(self, output: Any, name: str, ordinal: int) -> Any:
        """What was recorded, with what was received in place."""
        places = count()

        def known(leaf: Any) -> Any:
            place, kind = next(places), number_kind(leaf)
            if kind is not None:
                return self._numbers.get(NumberSlot(name, ordinal, place, kind), leaf)
            return self._known.get(id(leaf), leaf)

        return deep_map(output, known)

    def sent(self) -> list[Tensor]:
        """The boundary tensors of the exit, as they are now."""
        exit = self._forward.exit
        assert exit is not None
        found: list[Tensor] = []
        for item in exit.boundary:
            if item.call < 0:
                found.append(encoded(exit.numbers, self._with_attributes(exit.numbers), found[0].device))
            else:
                found.append(_as_traced(self._known.get(id(item.tensor)), item.tensor, exit.label))
        return found

    def _with_attributes(self, slots: tuple[NumberSlot, ...]) -> dict[NumberSlot, Any]:
        assert self._module is not None
        there = [slot for slot in slots if slot.place < 0]
        owners = {slot: self._module.get_submodule(slot.name) for slot in there}
        return {**self._numbers, **{slot: getattr(owners[slot], str(slot.key), None) for slot in there}}


def _as_traced(tensor: Tensor | None, expected: Tensor, label: str) -> Tensor:
    """A boundary tensor; raises a RuntimeError where it is another than when the step was traced."""
    if is_placeholder(tensor):
        raise RuntimeError(
            f"pp: at {label!r} what is sent on depends on parameters of another stage, which the first batch of this "
            "shape did not use there. A step whose path changes (by epoch, by values) can't be cut here: name other "
            "pipeline_cuts"
        )
    if tensor is None or tensor.shape != expected.shape or tensor.dtype != expected.dtype:
        kind = "nothing" if tensor is None else f"{tensor.dtype} of {list(tensor.shape)}"
        raise RuntimeError(
            f"pp: at {label!r} this batch gave {kind} where the first batch of this shape gave {expected.dtype} of "
            f"{list(expected.shape)}: shapes that depend on values can't cross a cut"
        )
    return tensor


def _kind(leaf: Any) -> Any:
    """What must stay of something that a call returns."""
    if isinstance(leaf, Tensor):
        return Tensor
    return number_kind(leaf) or (leaf if isinstance(leaf, str) else type(leaf))


def _calls_inside(trace: Trace) -> dict[tuple[str, int], Counter[str]]:
    """How often the modules inside of a call were called in it, which a stage that skips it does not see."""
    inside: dict[tuple[str, int], Counter[str]] = {}
    for call in trace.calls:
        parent = call.parent
        while parent >= 0:
            around = trace.calls[parent]
            inside.setdefault((around.name, around.ordinal), Counter())[call.name] += 1
            parent = around.parent
    return inside
