"""Replay: which steps of a tape are needed, and running them with no more memory than the values in work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_dist.initialization.tape import Constant, Slot, Step, StreamPlayer, Tape
from lightning_dist.pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class ReplayPlan:
    """What a replay does for some wanted storages.

    A step is needed if values that it writes are used later, or, for its random numbers alone, if it draws. Most
    models fill their weights twice (``reset_parameters``, then an own scheme): the first filling is drawn into
    scratch memory and dropped.

    Args:
        runs: steps that run, in order.
        on_scratch: those that run only to advance a generator.
        frees: storages whose values nobody uses after a step.
        finished: wanted storages whose values are final and used by no later step.
        never_filled: wanted storages that were left uninitialised.
        unknown: storages whose values are needed before the first step.
    """

    runs: list[int] = field(default_factory=list)
    on_scratch: set[int] = field(default_factory=set)
    frees: dict[int, set[int]] = field(default_factory=dict)
    finished: dict[int, set[int]] = field(default_factory=dict)
    never_filled: set[int] = field(default_factory=set)
    unknown: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, tape: Tape, wanted: Iterable[int]) -> ReplayPlan:
        """The plan, from the last step to the first: what is live after a step decides whether it is needed."""
        plan = cls()
        live, open_ends = set(wanted), set(wanted)
        for number in range(len(tape.steps) - 1, -1, -1):
            step = tape.steps[number]
            is_used = bool(step.writes & live)
            if not is_used and step.draw is None:
                continue
            plan.runs.append(number)
            touched = step.reads | step.writes
            if not is_used and step.ignores_values:
                plan.on_scratch.add(number)
                touched = step.reads - step.writes
            plan.finished[number] = set(touched & open_ends)
            plan.frees[number] = set(touched - live)
            open_ends -= touched
            if number not in plan.on_scratch:
                live -= step.fills
            live |= step.reads & touched
        plan.runs.reverse()
        plan.never_filled.update(open_ends)
        plan.unknown.update(number for number in live if not tape.storages[number].is_known)
        return plan


@torch.no_grad()
def replay(tape: Tape, plan: ReplayPlan, hand_over: Callable[[int, torch.UntypedStorage], None]) -> None:
    """Runs a plan. ``hand_over(number, storage)`` gets each wanted storage once its values are final.

    The generators start where the recording started and end where plain building would have left them.
    """
    player = _Player(tape)
    dtype = torch.get_default_dtype()
    try:
        for number in sorted(plan.never_filled):
            hand_over(number, player.pop(number))
        for number in plan.runs:
            player.run(tape.steps[number], number in plan.on_scratch)
            for storage in plan.finished[number]:
                hand_over(storage, player.pop(storage))
            for storage in plan.frees[number]:
                player.values.pop(storage, None)
    finally:
        torch.set_default_dtype(dtype)
    for stream in player.streams.values():
        stream.finish()


class _Player:
    """The values that are alive."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self.values: dict[int, torch.UntypedStorage] = {}
        self.streams = {stream: StreamPlayer(stream) for stream in tape.streams}

    def run(self, step: Step, on_scratch: bool) -> None:
        scratch = step.writes if on_scratch else frozenset()
        if torch.get_default_dtype() != step.default_dtype:
            torch.set_default_dtype(step.default_dtype)

        def real(leaf: Any) -> Any:
            if isinstance(leaf, Constant):
                return leaf.value
            if not isinstance(leaf, Slot):
                return leaf
            if leaf.storage in scratch:
                return leaf.scratch(self._tape.storages[leaf.storage].device)
            return leaf.view(self._value(leaf.storage))

        args, kwargs = tree_map(real, (step.args, step.kwargs))
        if step.draw is None:
            result = step.function(*args, **kwargs)
        else:
            player = self.streams[step.draw.stream]
            player.jump(step.draw.jump)
            result = step.function(*args, **kwargs)
            player.after_draw(step.draw.number)
        results = tree_leaves(result) if step.outputs else []
        for place, slot in step.outputs.items():
            self.values[slot.storage] = _as_laid_out(results[place], slot, self._tape)

    def pop(self, number: int) -> torch.UntypedStorage:
        storage = self._value(number)
        del self.values[number]
        return storage

    def _value(self, number: int) -> torch.UntypedStorage:
        """The values of a storage; memory for them, if nothing has been written yet."""
        if number not in self.values:
            storage = self._tape.storages[number]
            empty = torch.empty(storage.meta.nbytes(), dtype=torch.uint8, device=storage.device)
            self.values[number] = empty.untyped_storage()
        return self.values[number]


def _as_laid_out(result: Tensor, slot: Slot, tape: Tape) -> torch.UntypedStorage:
    """The storage of a result, in the layout that the meta device had inferred for it."""
    storage = result.untyped_storage()
    num_bytes = tape.storages[slot.storage].meta.nbytes()
    laid_out = tuple(result.stride()) == slot.stride and result.storage_offset() == slot.offset
    if laid_out and storage.nbytes() == num_bytes:
        return storage
    fresh = torch.empty(num_bytes, dtype=torch.uint8, device=result.device).untyped_storage()
    slot.view(fresh).copy_(result)
    return fresh
