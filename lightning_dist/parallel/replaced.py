"""Parameters that a layout makes other objects: who holds the old ones gets the new, and after the run the old again.

[Note: parameters that are replaced]
Dividing a parameter makes it another object. An optimizer that was made in ``__init__``, a list of parameters for a
penalty or for groups, a tied weight that is kept in a list: each goes on with the old one, which nobody trains, without
a word. What modules, callbacks and optimizers hold of old ones is exchanged; where something else does, that is said.
After the run the old objects are put back, with the values of the new, see :mod:`~lightning_dist.parallel.give_back`;
meanwhile they are empty.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CellType, FrameType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dist.compat.lightning import MODULE_ATTRIBUTES
from lightning_dist.compat.torch import MODULE_REGISTRIES
from lightning_dist.placeholder import is_placeholder

OF_ENDED_RUNS = WeakSet[Optimizer]()
"""Optimizers of fits that have ended, which may hold old parameters as long as their Trainer lives."""

_DEEPEST = 4
"""Containers inside of containers that are looked into."""

_ROUNDS = 3
_IN_HOOKS = "in configure_optimizers, in on_fit_start"
_OWN = {*MODULE_REGISTRIES, *MODULE_ATTRIBUTES}
"""Attributes of modules that are torch's or Lightning's."""


class Replaced:
    """The parameters of a module before they are divided.

    Args:
        module: as the user built it.
        in_lists: exchange them in any list that holds them, whoever has it: under Fabric the user's own script makes
            optimizers, and lists of parameters for them.
    """

    def __init__(self, module: nn.Module, in_lists: bool = False) -> None:
        self._before = dict(module.named_parameters())
        self._in_lists = in_lists
        self.originals: dict[str, nn.Parameter] = {}
        """What was replaced, by name, without its values; after :meth:`exchange`."""

    def exchange(self, module: nn.Module, owners: Iterable[object]) -> None:
        """Gives those who hold an old parameter the one that is in its place.

        Args:
            module: divided by now.
            owners: callbacks and the like; the module's own modules are looked at anyway.

        Raises:
            ValueError: something else holds an old one, or an optimizer has a state for it.
        """
        now = dict(module.named_parameters(remove_duplicate=False))
        places: dict[int, tuple[Tensor, Tensor, str]] = {
            id(old): (old, now[name], name) for name, old in self._before.items() if now[name] is not old
        }
        self._before = {}
        if not places:
            return
        Exchange(places).run([*module.modules(), *owners])
        if self._in_lists:
            _exchange_in_lists(places)
        names = [name for *_, name in places.values()]
        held: list[Any] = [places.pop(key)[0] for key in list(places)]
        self._refuse_held(held, names)
        # what was deferred has no values to be given back: it gets new parameters
        self.originals = {name: p for name, p in zip(names, held, strict=True) if not (p.is_meta or is_placeholder(p))}
        for parameter in self.originals.values():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)

    def _refuse_held(self, held: list[Any], names: list[str]) -> None:
        for _ in range(_ROUNDS):
            if not any(_is_held(held, index) for index in range(len(held))):
                return
            gc.collect()
        known = [held, *(optimizer.state for optimizer in OF_ENDED_RUNS)]
        known += [group["params"] for optimizer in OF_ENDED_RUNS for group in optimizer.param_groups]
        for index in range(len(held)):
            if _is_held(held, index):
                holder = _holder(held[index], known)
                if holder:
                    when, instead = ("the setup", "after it") if self._in_lists else ("the fit", _IN_HOOKS)
                    raise ValueError(
                        f"{holder} holds the parameter {names[index]} from before {when}; the layout "
                        "divides it, which makes it another object, and that one would never be trained: collect "
                        f"parameters {instead}, or where they are used"
                    )


def _is_held(held: list[Any], index: int) -> bool:
    return sys.getrefcount(held[index]) > 2


def _holder(parameter: Tensor, known: list[Any]) -> str:
    """Who of the user's holds it, in words; empty if nobody does."""
    for holder in gc.get_referrers(parameter):
        if any(holder is other for other in known) or isinstance(holder, FrameType):
            continue
        if isinstance(holder, CellType):
            return "a function (by its closure)"
        if isinstance(holder, dict) and _is_globals(holder):
            continue  # a loop of a script leaves its variable there
        if isinstance(holder, (list, tuple, set, dict)):
            return f"a {type(holder).__name__}"
        if not type(holder).__module__.startswith(("torch", "lightning")):
            return f"a {type(holder).__name__}"
    return ""


def _is_globals(names: dict[Any, Any]) -> bool:
    module = sys.modules.get(str(names.get("__name__", "")))
    return module is not None and vars(module) is names


def _exchange_in_lists(places: dict[int, tuple[Tensor, Tensor, str]]) -> None:
    """In place, in all lists that hold an old one."""
    for holder in gc.get_referrers(*(old for old, _, _ in places.values())):
        if type(holder) is list:
            holder[:] = [places[id(item)][1] if id(item) in places else item for item in holder]


class Exchange:
    """Gives those who hold parameters others in their place: in attributes, plain containers, and optimizers.

    Args:
        places: by the identity of the old one: it, the new one, its name.
        of_state: makes of an optimizer's state of an old one that of the new one; None to refuse where there is one.
    """

    def __init__(
        self, places: dict[int, tuple[Tensor, Tensor, str]], of_state: Callable[[Any], Any] | None = None
    ) -> None:
        self._places, self._of_state = places, of_state
        self._seen: set[int] = set()

    def run(self, owners: Iterable[Any]) -> None:
        """Looks at the attributes of these objects."""
        for owner in owners:
            for name, value in list(_attributes(owner)):
                new = self._exchanged(value, _DEEPEST)
                if new is not value:
                    vars(owner)[name] = new

    def _exchanged(self, value: Any, depth: int) -> Any:
        if isinstance(value, Tensor):
            place = self._places.get(id(value))
            return value if place is None else place[1]
        if isinstance(value, Optimizer):
            self._exchange_in(value)
            return value
        if depth == 0 or id(value) in self._seen:
            return value
        if type(value) in (list, dict, set):
            self._seen.add(id(value))
        if type(value) is list:
            value[:] = [self._exchanged(item, depth - 1) for item in value]
        elif type(value) is dict:
            items = [(self._exchanged(k, depth - 1), self._exchanged(v, depth - 1)) for k, v in value.items()]
            if any(new[0] is not key or new[1] is not value[key] for new, key in zip(items, value, strict=True)):
                value.clear()
                value.update(items)
        elif type(value) is set and any(id(item) in self._places for item in value):
            items_of_set = [self._exchanged(item, 1) for item in value]
            value.clear()
            value.update(items_of_set)
        elif type(value) is tuple:
            items_of_tuple = [self._exchanged(item, depth - 1) for item in value]
            if any(new is not old for new, old in zip(items_of_tuple, value, strict=True)):
                return tuple(items_of_tuple)
        return value

    def _exchange_in(self, optimizer: Optimizer) -> None:
        if id(optimizer) in self._seen:
            return
        self._seen.add(id(optimizer))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self._places and optimizer.state.get(parameter):
                    self._exchange_state(optimizer, parameter)
            group["params"][:] = [self._exchanged(p, 1) for p in group["params"]]
        for name, value in list(vars(optimizer).items()):
            if name not in ("param_groups", "state"):
                new = self._exchanged(value, 2)
                if new is not value:
                    vars(optimizer)[name] = new

    def _exchange_state(self, optimizer: Optimizer, parameter: Any) -> None:
        _, new, name = self._places[id(parameter)]
        if self._of_state is None:
            raise ValueError(
                f"{type(optimizer).__name__} was made before the fit and has a state of "
                f"{name}, which the layout divides: make it in configure_optimizers, "
                "and pass ckpt_path= to go on (under Fabric: load its state after the setup)"
            )
        optimizer.state[new] = self._of_state(optimizer.state.pop(parameter))


def _attributes(owner: Any) -> Iterator[tuple[str, Any]]:
    own = getattr(owner, "__dict__", {})
    return ((name, value) for name, value in own.items() if not (isinstance(owner, nn.Module) and name in _OWN))
