"""What torch's own optimizers collect of their groups at the beginning of a step, kept from step to step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any

from torch import Tensor

_IS_SPARSE = attrgetter("is_sparse")


class Collected:
    """Parameters, gradients and states of each group, in lists as torch's step wants them.

    To collect them torch asks each parameter several things in Python, which takes longer than a ``fused`` step of
    small ones. While parameters, states and settings are the same, and the same parameters have gradients, the lists of
    the step before hold, but for the gradients.

    Args:
        collect: the optimizer's own method, of a group and the lists that it adds to.
    """

    def __init__(self, collect: Callable[..., Any]) -> None:
        self._collect = collect
        self._gradients: dict[int, list[Tensor]] = {}
        """Of the step that runs, by the list of a group's parameters."""
        self._noted: dict[int, tuple[list[list[Any] | None], Any]] = {}
        """By the list of a group's parameters: what it collected, None for gradients, and what it returned."""
        self._objects: list[Any] = []
        self._facts: list[Any] = []
        """What the notes depend on: as objects, and by their value."""
        self.holds = False
        """Whether the lists of the step before are those of the one that runs."""

    def begin(
        self,
        groups: Sequence[Mapping[str, Any]],
        gradients: Sequence[list[Tensor]],
        there: list[bool],
        sources: Iterable[object],
    ) -> bool:
        """Whether the lists of the step before hold for this one, which then asks no parameter for its gradient.

        Args:
            groups: with the parameters that are stepped over.
            gradients: that there are, group by group.
            there: which parameters have one.
            sources: stand for the parameters and their states; of others there are other objects.
        """
        objects: list[Any] = [*sources]
        facts: list[Any] = [there]
        for group, own in zip(groups, gradients, strict=True):
            self._gradients[id(group["params"])] = own
            facts.append(any(map(_IS_SPARSE, own)))
            for name, value in group.items():
                objects += [name, None if _is_rate(value) else value]
        before = self._objects
        self.holds = facts == self._facts and len(objects) == len(before) and all(map(is_, objects, before))
        if not self.holds:
            self._objects, self._facts, self._noted = objects, facts, {}
        return self.holds

    def collect(self, group: Mapping[str, Any], *lists: list[Any]) -> Any:
        """In place of the optimizer's own method, between :meth:`begin` and :meth:`end`."""
        key = id(group["params"])
        gradients, noted = self._gradients[key], self._noted.get(key)
        if noted is None:
            result = self._collect(group, *lists)
            self._noted[key] = [None if _same(one, gradients) else [*one] for one in lists], result
            return result
        for one, before in zip(lists, noted[0], strict=True):
            one += gradients if before is None else before
        return noted[1]

    def end(self) -> None:
        """The gradients are the user's to free; of a step that was not finished nothing holds."""
        if len(self._noted) < len(self._gradients):
            self._objects = []
        self._gradients = {}


def _is_rate(value: Any) -> bool:
    """Whether a setting is a number, or some, that schedulers change and that nothing is collected by, if it is not 0:
    a rate of learning, of decay, of an average.
    """
    return value != 0 if type(value) is float else type(value) is tuple and all(map(_is_rate, value))


def _same(one: list[Any], other: list[Any]) -> bool:
    return bool(one) and len(one) == len(other) and all(map(is_, one, other))
