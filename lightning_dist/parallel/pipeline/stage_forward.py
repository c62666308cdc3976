"""A stage: the user's own step, entered at one cut and left at the next."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor, nn

from lightning_dist.compat.torch import COMPILED_CALL, call_of
from lightning_dist.parallel.pipeline.p2p import NumberSlot, decoded, encoded
from lightning_dist.parallel.pipeline.split_points import BoundaryTensor, SplitPoint, skipped_calls
from lightning_dist.parallel.pipeline.trace import Trace, number_kind
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

    Hooks of modules that are skipped or entered don't run: they ran on the stage that owns them. A stage without an
    entry is the first, and one without an exit the last.
    """

    def __init__(self, trace: Trace, entry: SplitPoint | None, exit: SplitPoint | None) -> None:
        self.entry, self.exit = entry, exit
        self.skipped = skipped_calls(trace, entry) if entry is not None else {}
        """What calls return that the stage skips: by the module's name and the call's number."""
        self.inside = _calls_inside(trace)
        received = {id(item.tensor) for item in entry.boundary} if entry is not None else set()
        self.kept = [kept for kept in trace.kept if id(kept[3]) in received]
        """What modules that are skipped, or their hooks, have put into attributes, and the step reads later."""
        self.entered_output: Any = None if entry is None else trace.calls[entry.call].output
        self.captured = self._calls_to_capture(trace)
        """Boundary tensors of the exit that other calls than the last one return, by those."""
        numbers = set() if exit is None else {(slot.name, slot.key) for slot in exit.numbers if slot.place >= 0}
        outputs = {(call.name, call.ordinal): call.output for call in trace.calls}
        self.returned = {key: deep_leaves(output) for key, output in outputs.items() if key in numbers}
        """The leaves that calls returned in the trace, where later stages take numbers of them."""
        self.sees_metrics = entry is not None and any(op <= entry.after for op in trace.metrics)
        """Whether the step uses metrics before the entry."""
        watched = {*self.skipped, *(name for name, _ in (*self.captured, *self.returned))}
        self.watched = watched | {point.name for point in (entry, exit) if point is not None}
        """Names of the modules whose calls the stage has to see."""

    def _calls_to_capture(self, trace: Trace) -> dict[tuple[str, int], list[BoundaryTensor]]:
        captured = defaultdict(list)
        for item in () if self.exit is None else self.exit.boundary:
            call = trace.calls[item.call]
            is_before = self.entry is not None and (item.call == self.entry.call or call.last <= self.entry.after)
            if item.call >= 0 and not is_before:
                captured[call.name, call.ordinal].append(item)
        return captured

    def run(
        self, module: nn.Module, step: Callable[[], Any], received: list[Tensor], on_enter: Callable[[], None]
    ) -> tuple[list[Tensor], Any]:
        """Runs the step, with a batch of the traced shape, from the entry to the exit.

        Args:
            received: the tensors of the entry's cut, in its order.
            on_enter: called when everything before the entry has run.

        Returns:
            The tensors of the exit's cut and None; or, on the last stage, nothing and what the step returned.

        Raises:
            RuntimeError: the step did not pass the entry or the exit as it did when it was traced.
        """
        run = _MicrobatchInStage(self, module, received, on_enter)
        with _wrapped_calls(module, self.watched, run.call):
            try:
                output = step()
            except StageExit:
                assert self.exit is not None
                return run.sent(self.exit), None
        if not run.entered or self.exit is not None:
            missed = self.exit if run.entered else self.entry
            assert missed is not None
            raise RuntimeError(
                f"pp: this step did not call {missed.label!r}, where the network is cut; it did on the first batch of "
                "this shape. A step whose path depends on values can't be cut there: name other pipeline_cuts"
            )
        return [], output


class RecordedForward:
    """A step whose modules return what was recorded of them; what it does beside is real."""

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
        counts: Counter[str] = Counter()

        def call(name: str, original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            key = name, counts[name]
            counts[name] += 1
            if key not in self._returned:
                return original(*args, **kwargs)
            counts.update(self._inside[key])
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

    def __init__(
        self, forward: StageForward, module: nn.Module, received: list[Tensor], on_enter: Callable[[], None]
    ) -> None:
        self._forward, self._module, self._on_enter = forward, module, on_enter
        self.entered = forward.entry is None
        self._counts: Counter[str] = Counter()
        boundary, slots = ((), ()) if forward.entry is None else (forward.entry.boundary, forward.entry.numbers)
        self._known: dict[int, Tensor] = {id(item.tensor): t for item, t in zip(boundary, received, strict=True)}
        self._numbers: dict[NumberSlot, Any] = decoded(slots, received[-1]) if slots else {}

    def call(self, name: str, original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        forward, ordinal = self._forward, self._counts[name]
        self._counts[name] += 1
        if not self.entered:
            if _is_call_of(forward.entry, name, ordinal):
                self._counts.update(forward.inside[name, ordinal])
                self.entered = True
                self._on_enter()
                self._keep()
                return self._received(forward.entered_output, name, ordinal)
            if ordinal in forward.skipped.get(name, {}):
                self._counts.update(forward.inside[name, ordinal])
                return self._received(forward.skipped[name][ordinal], name, ordinal)
        output = original(*args, **kwargs)
        if (name, ordinal) in forward.returned:
            self._note_numbers(name, ordinal, deep_leaves(output))
        for item in forward.captured.get((name, ordinal), ()):
            self._known[id(item.tensor)] = deep_tensors(output)[item.place]
        if _is_call_of(forward.exit, name, ordinal):
            raise StageExit
        return output

    def _keep(self) -> None:
        """Attributes as the modules that this stage skips have left them."""
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
            if (kind := number_kind(leaf)) is not None:
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

    def sent(self, exit: SplitPoint) -> list[Tensor]:
        """The boundary tensors of the exit, as they are now."""
        attributes = {
            slot: getattr(self._module.get_submodule(slot.name), str(slot.key), None)
            for slot in exit.numbers
            if slot.place < 0
        }
        found: list[Tensor] = []
        for item in exit.boundary:
            if item.call < 0:
                found.append(encoded(exit.numbers, {**self._numbers, **attributes}, found[0].device))
            else:
                found.append(_as_traced(self._known.get(id(item.tensor)), item.tensor, exit.label))
        return found


def _is_call_of(point: SplitPoint | None, name: str, ordinal: int) -> bool:
    return point is not None and (point.name, point.ordinal) == (name, ordinal)


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
    inside: dict[tuple[str, int], Counter[str]] = {(call.name, call.ordinal): Counter() for call in trace.calls}
    for index, call in enumerate(trace.calls):
        for around in map(trace.calls.__getitem__, trace.around(index)):
            inside[around.name, around.ordinal][call.name] += 1
    return inside
