"""What a rank holds of the parameters of an optimizer, their gradients and states, as plain tensors; from step to step.

Looked at in each step, of hundreds of parameters: in few calls, and nothing is made anew that is as it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain, compress, islice
from operator import is_
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor

from lightning_dist.compat.operators import LAYOUT, LOCAL_PART, divided_tensor, is_divided_alike


class LocalParts:
    """What this rank holds of the parameters of an optimizer's groups."""

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._sizes = [len(group["params"]) for group in groups]
        self._whole = [p for group in groups for p in group["params"]]
        self._divided = [p for p in self._whole if isinstance(p, DTensor)]
        self._held = [*map(LOCAL_PART, self._divided)]
        self._local = [held.detach() for held in self._held]
        self._layouts = [*map(LAYOUT, self._divided)]
        self.gradients: list[list[Tensor]] = []
        """Local parts of the gradients of a step that there are, group by group."""
        self.there: list[bool] = []
        """Which of the parameters have one."""
        self._taken: list[Tensor] = []
        """Those of divided parameters."""
        self._stepped: tuple[list[DTensor], list[Tensor]] = [], []
        """These parameters, and what this rank holds of them."""
        self._is_lent = False
        self.local_of = dict(zip(map(id, self._divided), self._local, strict=True))
        self.divided_of = dict(zip(map(id, self._local), self._divided, strict=True))
        self.groups = [[self.local_of.get(id(p), p) for p in group["params"]] for group in groups]
        # a state of no dim may be of the parameter, or a number beside it
        self.can_step = bool(self._divided) and all(p.ndim for p in self._divided)

    def are_those_of(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these groups have the same parameters, in the same memory."""
        now = [p for group in groups for p in group["params"]]
        is_same = _same(now, self._whole) and [len(group["params"]) for group in groups] == self._sizes
        return is_same and _same([*map(LOCAL_PART, self._divided)], self._held)

    def take_gradients(self) -> bool:
        """Takes the local parts of gradients, if all of these are divided as the parameters are."""
        whole: list[Any] = [p.grad for p in self._divided]
        layouts = self._layouts
        there = [gradient is not None for gradient in whole]
        self._stepped = self._divided, self._local
        if not all(there):
            whole, layouts = [*compress(whole, there)], [*compress(layouts, there)]
            self._stepped = [*compress(self._divided, there)], [*compress(self._local, there)]
        try:
            if [*map(LAYOUT, whole)] != layouts:
                return False
        except AttributeError:  # a plain one
            return False
        self._taken = [*map(LOCAL_PART, whole)]
        self._sort_by_group(there)
        return True

    def _sort_by_group(self, there: list[bool]) -> None:
        if len(self._divided) == len(self._whole) and all(there):
            taken = iter(self._taken)
            self.there, self.gradients = there, [[*islice(taken, size)] for size in self._sizes]
            return
        taken, divided = iter(self._taken), iter(there)
        flat: list[Any] = []
        for p, own in zip(self._whole, chain(*self.groups), strict=True):
            flat.append(p.grad if own is p else next(taken) if next(divided) else None)
        self.there, groups = [gradient is not None for gradient in flat], iter(flat)
        self.gradients = [[g for g in islice(groups, size) if g is not None] for size in self._sizes]

    def lend_gradients(self) -> None:
        """Gives the local parts those of the gradients, as torch's optimizers ask for them."""
        for one, part in zip(self._stepped[1], self._taken, strict=True):
            one.grad = part
        self._is_lent = True

    def drop_gradients(self) -> None:
        """They are the user's to free; and the parameters have been written to."""
        divided, local = self._stepped
        if self._is_lent:
            for one in local:
                one.grad = None
        increment_version(divided)
        self.gradients, self._taken, self._stepped, self._is_lent = [], [], ([], []), False


class LocalStates:
    """An optimizer's states over local parts; ``local`` is made anew where the optimizer's are other ones."""

    def __init__(self, parts: LocalParts) -> None:
        self._parts = parts
        self.local: defaultdict[Any, Any] = defaultdict(dict)
        self.seen: list[list[Any]] = [[], [], []]
        """Of the optimizer's: keys, values, and the local parts of these, held, so that a new one is another. Another
        list where any of them is another."""
        self._divided: list[DTensor] = []
        self._before: list[Any] = []
        """The values of the local ones."""

    def take(self, state: Mapping[Any, Any]) -> bool:
        """Whether all states of the divided parameters are laid out as these."""
        now = [*state], _values(state), [*map(LOCAL_PART, self._divided)]
        if not all(map(_same, now, self.seen)):
            if not self._localise(state):
                return False
            self._note(state)
        return True

    def _note(self, state: Mapping[Any, Any]) -> None:
        values = _values(state)
        self._divided = [value for value in values if isinstance(value, DTensor)]
        self.seen = [[*state], values, [*map(LOCAL_PART, self._divided)]]
        self._before = _values(self.local)

    def _localise(self, state: Mapping[Any, Any]) -> bool:
        self.local, self.seen = defaultdict(dict), [[], [], []]
        for key, own in state.items():
            local = self._parts.local_of.get(id(key))
            if local is None:
                self.local[key] = own
            elif all(_is_beside(value, key) for value in own.values()):
                self.local[local] = {name: _local(value) for name, value in own.items()}
            else:
                return False
        return True

    def give_back(self, state: Any) -> None:
        """Notes what a step made, as divided tensors."""
        if _same(_values(self.local), self._before):
            return
        for key, own in self.local.items():
            whole = self._parts.divided_of.get(id(key))
            if whole is None:
                if key not in state:
                    state[key] = own
                continue
            there = state[whole]
            for name, value in own.items():
                if name not in there or _local(there[name]) is not value:
                    there[name] = _divided(value, whole)
        self._note(state)


def _values(state: Mapping[Any, Any]) -> list[Any]:
    return [*chain.from_iterable(map(dict.values, state.values()))]


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(is_, one, other))


def _is_beside(value: Any, whole: DTensor) -> bool:
    """Whether an entry of a state is divided as the parameter, or no tensor of elements."""
    if isinstance(value, DTensor):
        return is_divided_alike(value, whole)
    return not isinstance(value, Tensor) or not value.ndim


def _local(value: Any) -> Any:
    return LOCAL_PART(value) if isinstance(value, DTensor) else value


def _divided(value: Any, whole: DTensor) -> Any:
    return divided_tensor(type(whole), value, whole) if isinstance(value, Tensor) and value.ndim else value
