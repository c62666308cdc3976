"""A stage: the user's own step, entered at one cut and left at the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor, nn

from lightning_dist.parallel.pipeline.cuts import Crossing, CutPoint, skipped_calls
from lightning_dist.parallel.pipeline.nested import number_kind
from lightning_dist.parallel.pipeline.numbers import Slot, decoded, encoded
from lightning_dist.parallel.pipeline.trace import Trace
from lightning_dist.placeholder import is_placeholder
from lightning_dist.pytree import deep_leaves, deep_map, deep_tensors


class Leave(BaseException):
    """Passes through the user's step once the stage has its output; no ``except Exception`` catches it."""


class Passage:
    """How one stage runs a step on batches of the shape that was traced.

    The step is called on every stage. Before the entry, modules return what the trace recorded, tensors without memory,
    and the step's Python between them runs on those, which costs almost nothing. The module at the entry returns what
    was received, and from there everything is real. A call of the module at the exit raises, through the step.

    Hooks of modules that are skipped or entered don't run: they ran on the stage that owns them.

    Args:
        trace: of the step.
        enter: the cut at which the stage begins; None for the first.
        leave: the cut at which it ends; None for the last.
    """

    def __init__(self, trace: Trace, enter: CutPoint | None, leave: CutPoint | None) -> None:
        self.enter, self.leave = enter, leave
        self._skipped = skipped_calls(trace, enter) if enter is not None else {}
        self._inside = _calls_inside(trace, self._skipped)
        received = {id(c.tensor) for c in enter.crossing} if enter is not None else set()
        self.kept = [kept for kept in trace.kept if id(kept[3]) in received]
        """What modules that are skipped, or their hooks, have put into attributes, and the step reads later."""
        self._captured: dict[str, dict[int, list[Crossing]]] = {}
        self.entered_output: Any = None if enter is None else trace.calls[enter.call].output
        begin = -1 if enter is None else enter.call
        for crossing in leave.crossing if leave is not None else ():
            if crossing.call < 0:
                continue
            call = trace.calls[crossing.call]
            if enter is None or (crossing.call != begin and call.last > enter.after):
                self._captured.setdefault(call.name, {}).setdefault(call.ordinal, []).append(crossing)
        outputs = {(call.name, call.ordinal): deep_leaves(call.output) for call in trace.calls}
        self.returned: dict[tuple[str, int], list[Any]] = {}
        """Of calls that return numbers which later stages take, the leaves of what they returned in the trace."""
        for slot in leave.numbers if leave is not None else ():
            if slot.place >= 0:
                self.returned[slot.name, slot.key] = outputs[slot.name, slot.key]
        self.sees_metrics = enter is not None and any(op <= enter.after for op in trace.metrics)
        """Whether the step uses metrics before the entry."""
        watched = {*self._skipped, *self._captured, *(name for name, _ in self.returned)}
        self.watched = watched | {point.name for point in (enter, leave) if point is not None}
        """Names of the modules whose calls the stage has to see."""

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
        run = _Run(self, received, on_enter)
        with run.watching(module):
            try:
                output = step()
            except Leave:
                return run.sent(), None
        if not run.entered or self.leave is not None:
            missed = self.leave if run.entered else self.enter
            assert missed is not None
            raise RuntimeError(
                f"pp: this step did not call {missed.label!r}, where the network is cut; it did on the first batch of "
                "this shape. A step whose path depends on values can't be cut there: name other pipeline_cuts"
            )
        return [], output


class Ghost:
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
        self._inside = _calls_inside(trace, {})

    def run(self, module: nn.Module, step: Callable[[], Any]) -> None:
        """Runs the step."""
        counts: Counter[str] = Counter()

        def call(name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            key = name, counts[name]
            counts[name] += 1
            if key not in self._returned:
                return original(*args, **kwargs)
            counts.update(self._inside.get(key, {}))
            return self._returned[key]

        with _standing_before(module, {name for name, _ in self._returned}, call):
            step()


@contextmanager
def _standing_before(module: nn.Module, names: Iterable[str], call: Callable[..., Any]) -> Iterator[None]:
    """Stands before the calls of modules.

    torch calls ``_compiled_call_impl`` in place of a module's hooks and forward where there is one (private; seen
    in 2.14); copies and pickles leave it out.
    """
    before = []
    for name in names:
        child = module.get_submodule(name)
        own = vars(child).get("_compiled_call_impl")
        before.append((child, own))
        vars(child)["_compiled_call_impl"] = partial(call, name, own or child._call_impl)
    try:
        yield
    finally:
        for child, own in before:
            if own is None:
                del vars(child)["_compiled_call_impl"]
            else:
                vars(child)["_compiled_call_impl"] = own


class _Run:
    """One microbatch on its way through a stage."""

    def __init__(self, passage: Passage, received: list[Tensor], on_enter: Callable[[], None]) -> None:
        self._passage, self._on_enter = passage, on_enter
        self._module: nn.Module | None = None
        self.entered = passage.enter is None
        self._counts: Counter[str] = Counter()
        crossing = passage.enter.crossing if passage.enter is not None else ()
        self._known: dict[int, Tensor] = {id(c.tensor): t for c, t in zip(crossing, received, strict=True)}
        self._numbers: dict[Slot, Any] = {}
        if passage.enter is not None and passage.enter.numbers:
            self._numbers = decoded(passage.enter.numbers, received[-1])

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Stands before the calls of the modules at hand."""
        self._module = module
        with _standing_before(module, self._passage.watched, self._call):
            yield

    def _call(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        passage, ordinal = self._passage, self._counts[name]
        self._counts[name] += 1
        if not self.entered:
            enter = passage.enter
            assert enter is not None
            if (name, ordinal) == (enter.name, enter.ordinal):
                self._counts.update(passage._inside.get((name, ordinal), {}))
                self.entered = True
                self._on_enter()
                self._keep()
                return self._received(passage.entered_output, name, ordinal)
            if ordinal in passage._skipped.get(name, {}):
                self._counts.update(passage._inside.get((name, ordinal), {}))
                return self._received(passage._skipped[name][ordinal], name, ordinal)
        output = original(*args, **kwargs)
        if (name, ordinal) in passage.returned:
            self._note_numbers(name, ordinal, deep_leaves(output))
        for crossing in passage._captured.get(name, {}).get(ordinal, ()):
            self._known[id(crossing.tensor)] = deep_tensors(output)[crossing.place]
        leave = passage.leave
        if leave is not None and (name, ordinal) == (leave.name, leave.ordinal):
            raise Leave
        return output

    def _keep(self) -> None:
        """Attributes as the modules that this stage skips have left them."""
        assert self._module is not None
        for name, attribute, key, tensor in self._passage.kept:
            owner = vars(self._module.get_submodule(name))
            if key is None:
                owner[attribute] = self._known[id(tensor)]
            else:
                owner.setdefault(attribute, {})[key] = self._known[id(tensor)]

        for slot, value in self._numbers.items():
            if slot.place < 0:
                setattr(self._module.get_submodule(slot.name), str(slot.key), value)

    def _note_numbers(self, name: str, ordinal: int, found: list[Any]) -> None:
        expected = self._passage.returned[name, ordinal]
        if list(map(_kind, found)) != list(map(_kind, expected)):
            raise RuntimeError(
                f"pp: {name!r} returned {len(found)} values of other kinds than the {len(expected)} of the first batch "
                "of this shape, which later stages expect; name pipeline_cuts before that module"
            )
        for place, leaf in enumerate(found):
            kind = number_kind(leaf)
            if kind is not None:
                self._numbers[Slot(name, ordinal, place, kind)] = leaf

    def _received(self, output: Any, name: str, ordinal: int) -> Any:
        """What was recorded, with what was received in place."""
        places = count()

        def known(leaf: Any) -> Any:
            place, kind = next(places), number_kind(leaf)
            if kind is not None:
                return self._numbers.get(Slot(name, ordinal, place, kind), leaf)
            return self._known.get(id(leaf), leaf)

        return deep_map(output, known)

    def sent(self) -> list[Tensor]:
        """The tensors of the exit's cut, as they are now."""
        assert self._passage.leave is not None
        found: list[Tensor] = []
        leave = self._passage.leave
        for crossing in leave.crossing:
            if crossing.call < 0:
                found.append(encoded(leave.numbers, self._with_attributes(leave.numbers), found[0].device))
                continue
            tensor = self._known.get(id(crossing.tensor))
            expected = crossing.tensor
            if is_placeholder(tensor):
                raise RuntimeError(
                    f"pp: at {self._passage.leave.label!r} what is sent on depends on parameters of another stage, "
                    "which the first batch of this shape did not use there. A step whose path changes (by epoch, by "
                    "values) can't be cut here: name other pipeline_cuts"
                )
            if tensor is None or tensor.shape != expected.shape or tensor.dtype != expected.dtype:
                kind = "nothing" if tensor is None else f"{tensor.dtype} of {list(tensor.shape)}"
                raise RuntimeError(
                    f"pp: at {self._passage.leave.label!r} this batch gave {kind} where the first batch of this shape "
                    f"gave {expected.dtype} of {list(expected.shape)}: shapes that depend on values can't cross a cut"
                )
            found.append(tensor)
        return found

    def _with_attributes(self, slots: tuple[Slot, ...]) -> dict[Slot, Any]:
        assert self._module is not None
        there = [slot for slot in slots if slot.place < 0]
        owners = {slot: self._module.get_submodule(slot.name) for slot in there}
        return {**self._numbers, **{slot: getattr(owners[slot], str(slot.key), None) for slot in there}}


def _kind(leaf: Any) -> Any:
    """What must stay of something that a call returns."""
    if isinstance(leaf, Tensor):
        return Tensor
    return number_kind(leaf) or (leaf if isinstance(leaf, str) else type(leaf))


def _calls_inside(trace: Trace, skipped: dict[str, dict[int, Any]]) -> dict[tuple[str, int], Counter[str]]:
    """How often the modules inside of a call were called in it, which a stage that skips it does not see."""
    inside: dict[tuple[str, int], Counter[str]] = {}
    for call in trace.calls:
        parent = call.parent
        while parent >= 0:
            around = trace.calls[parent]
            inside.setdefault((around.name, around.ordinal), Counter())[call.name] += 1
            parent = around.parent
    return inside
