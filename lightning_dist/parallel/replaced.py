"""Parameters that a layout makes other objects: who holds the old ones gets the new, and after the run the old again.

[Note: parameters that are replaced]
Dividing a parameter makes it another object. An optimizer that was made in ``__init__``, a list of parameters for a
penalty or for groups, a tied weight that is kept in a list: each goes on with the old one, which nobody trains, without
a word. What modules, callbacks and optimizers hold of old ones is exchanged; where something else does, that is said.
After the run the old objects are put back, with the values of the new, see :func:`give_back`; meanwhile they are empty.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from types import CellType, FrameType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_dist.compat.lightning import MODULE_ATTRIBUTES
from lightning_dist.compat.torch import MODULE_REGISTRIES, own_buffers, own_parameters
from lightning_dist.divided import as_divided
from lightning_dist.dtensors import full, full_on_host, place_like
from lightning_dist.parallel.tensor import unsplit_copy
from lightning_dist.placeholder import is_placeholder
from lightning_dist.pytree import map_leaves, tree_leaves

OF_ENDED_RUNS = WeakSet[Optimizer]()
"""Optimizers of fits that have ended, which may hold old parameters as long as their Trainer lives."""

_DEEPEST = 4
"""Containers inside of containers that are looked into."""
_ROUNDS = 4
_MOMENT = 0.05
"""Seconds."""
_IN_HOOKS = "in configure_optimizers, in on_fit_start"
_OWN = {*MODULE_REGISTRIES, *MODULE_ATTRIBUTES}
"""Attributes of modules that are torch's or Lightning's."""
_Place = tuple[Tensor, Tensor, str]
"""An old parameter, the new one, and its name."""


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
            ValueError: something else holds an old one, or an optimizer has a state for it that can't be divided as it
                is, or under Fabric any.

        Communication: none; an optimizer's state of an old one is whole, and each rank keeps its part of it.
        """
        now = dict(module.named_parameters(remove_duplicate=False))
        places: dict[int, _Place] = {
            id(old): (old, now[name], name) for name, old in self._before.items() if now[name] is not old
        }
        self._before = {}
        if not places:
            return
        # a script of Fabric's may have another state on each rank
        _Exchange(places, _refuse_state if self._in_lists else _divided_state).run([*module.modules(), *owners])
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
        for number in range(_ROUNDS):
            left = [index for index in range(len(held)) if sys.getrefcount(held[index]) > 2]
            if not left:
                return
            if number:  # a thread that looks at this one's frames keeps their variables after they have returned
                time.sleep(_MOMENT)
            gc.collect()
        known = [held, *(optimizer.state for optimizer in OF_ENDED_RUNS)]
        known += [group["params"] for optimizer in OF_ENDED_RUNS for group in optimizer.param_groups]
        for index in left:
            if sys.getrefcount(held[index]) > 2 and (holder := _holder(held[index], known)):
                when, instead = ("the setup", "after it") if self._in_lists else ("the fit", _IN_HOOKS)
                raise ValueError(
                    f"{holder} holds the parameter {names[index]} from before {when}; the layout divides it, which "
                    "makes it another object, and that one would never be trained: collect parameters "
                    f"{instead}, or where they are used"
                )


def _holder(parameter: Tensor, known: list[Any]) -> str:
    """Who of the user's holds it, in words; empty if nobody does."""
    for holder in gc.get_referrers(parameter):
        if any(holder is other for other in known) or isinstance(holder, FrameType):
            continue
        if isinstance(holder, CellType):
            return "a function (by its closure)"
        script = sys.modules.get(str(holder.get("__name__"))) if isinstance(holder, dict) else None
        if script is not None and vars(script) is holder:
            continue  # a loop of a script leaves its variable there
        is_container = isinstance(holder, (list, tuple, set, dict))
        if is_container or not type(holder).__module__.startswith(("torch", "lightning")):
            return f"a {type(holder).__name__}"
    return ""


def _exchange_in_lists(places: dict[int, _Place]) -> None:
    for holder in gc.get_referrers(*(old for old, _, _ in places.values())):
        if type(holder) is list:
            holder[:] = [places[id(item)][1] if id(item) in places else item for item in holder]


def _refuse_state(optimizer: Optimizer, state: Any, place: _Place) -> Any:
    raise ValueError(
        f"{type(optimizer).__name__} was made before the fit and has a state of {place[2]}, which the layout divides: "
        "make it in configure_optimizers, and pass ckpt_path= to go on (under Fabric: load its state after the setup)"
    )


def _divided_state(optimizer: Optimizer, state: Any, place: _Place) -> Any:
    old, new, _ = place
    if is_placeholder(new) or new.shape != old.shape:
        return _refuse_state(optimizer, state, place)
    return map_leaves(state, lambda _, v: as_divided(place_like(v, new)) if isinstance(v, Tensor) else v)


class _Exchange:
    """Gives those who hold parameters others in their place: in attributes, plain containers, and optimizers.

    ``places`` are by the identity of the old one; ``of_state`` makes of an optimizer's state of it that of the new one.
    """

    def __init__(self, places: dict[int, _Place], of_state: Callable[[Optimizer, Any, _Place], Any]) -> None:
        self._places, self._of_state = places, of_state
        self._seen: set[int] = set()

    def run(self, owners: Iterable[Any]) -> None:
        for owner in owners:
            self._exchange_attributes(owner, _DEEPEST, _OWN if isinstance(owner, nn.Module) else ())

    def _exchange_attributes(self, owner: Any, depth: int, but: Container[str]) -> None:
        for name, value in list(getattr(owner, "__dict__", {}).items()):
            if name not in but and (new := self._exchanged(value, depth)) is not value:
                vars(owner)[name] = new

    def _exchanged(self, value: Any, depth: int) -> Any:
        if isinstance(value, Tensor):
            return self._places[id(value)][1] if id(value) in self._places else value
        if isinstance(value, Optimizer):
            self._exchange_in(value)
        kind = type(value)
        if kind not in (list, dict, set, tuple) or depth == 0 or id(value) in self._seen:
            return value
        if kind is not tuple:
            self._seen.add(id(value))
        held = list(value.items()) if kind is dict else list(value)
        new = [self._exchanged(item, depth if kind is dict else depth - 1) for item in held]
        if all(one is other for one, other in zip(new, held, strict=True)):
            return value
        if kind is tuple:
            return tuple(new)
        value.clear()
        if kind is list:
            value.extend(new)
        else:
            value.update(new)
        return value

    def _exchange_in(self, optimizer: Optimizer) -> None:
        if id(optimizer) in self._seen:
            return
        self._seen.add(id(optimizer))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                place = self._places.get(id(parameter))
                if place is not None and (state := optimizer.state.get(parameter)):
                    optimizer.state[place[1]] = self._of_state(optimizer, state, place)
                    del optimizer.state[parameter]
            group["params"][:] = [self._exchanged(p, 1) for p in group["params"]]
        self._exchange_attributes(optimizer, 2, ("param_groups", "state"))


def whole_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of which this rank (no other stage of a pipeline) holds a part, whole and on the CPU,
    by name; a tied one under its first.

    Communication: that of :func:`~lightning_dist.dtensors.full_on_host` for each; all ranks that hold a part call it.
    """
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: full_on_host(tensor, True) for name, tensor in named if isinstance(tensor, DTensor)}


@torch.no_grad()
def give_back(
    module: nn.Module,
    whole: Mapping[str, Tensor],
    originals: Mapping[str, nn.Parameter],
    owners: Iterable[object] = (),
    on_all_ranks: Callable[[dict[str, Any]], Iterable[str]] = list,
) -> None:
    """Puts whole, plain tensors where a module has parts or placeholders; called when its patches are undone.

    Parameters are the objects that they were before the run, where they were there; what ``configure_model`` built
    deferred gets new ones. ``requires_grad`` is that of now; gradients, which were parts, are gone. Who holds a part
    (lists and attributes of the module and of the owners, optimizers with their state) gets the whole.

    Args:
        module: divided, or cut.
        whole: of :func:`whole_tensors`, and what other stages hold.
        originals: see :class:`Replaced`.
        owners: callbacks, optimizers in a list or an attribute, and the like. Copies of modules that they keep are made
            whole too.
        on_all_ranks: given what owners keep parts of, by name, says which of it all ranks keep alike, in one order;
            called on all of them. What one rank alone keeps stays parts.

    Communication: none for the module; for each part in an optimizer's state or a copy that an owner keeps, that of
    :func:`~lightning_dist.dtensors.full`.
    """
    places: dict[int, _Place] = {}
    for tensors, name, full_name, tensor in _parts_in(module):
        if id(tensor) not in places:  # tied ones stay one
            if full_name not in whole:  # what a hook made of another stage's
                continue
            places[id(tensor)] = tensor, _whole(tensor, whole[full_name], originals.get(full_name)), full_name
        tensors[name] = places[id(tensor)][1]
    owners, kept = list(owners), dict[str, Any]()

    def keep(optimizer: Optimizer, state: Any, place: _Place) -> Any:
        kept[f"state {len(kept)}"] = state
        return state

    _Exchange(places, keep).run([*module.modules(), *owners])
    kept |= _modules_of(owners, module)
    for name in on_all_ranks({name: _shapes_of_parts(value) for name, value in kept.items()}):
        if isinstance(kept[name], nn.Module):
            _make_whole(kept[name])
        else:
            kept[name].update(map_leaves(kept[name], lambda _, v: full(v) if isinstance(v, DTensor) else v))


def _parts_in(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, str, Any]]:
    """Parameters and buffers that are parts or placeholders: where each is registered, as what, its full name, it."""
    for prefix, child in module.named_modules():
        for tensors in (own_parameters(child), own_buffers(child)):
            for name, tensor in tensors.items():
                if isinstance(tensor, DTensor) or is_placeholder(tensor):
                    yield tensors, name, f"{prefix}.{name}" if prefix else name, tensor


def _shapes_of_parts(kept: Any) -> list[tuple[int, ...]]:
    values = kept.state_dict().values() if isinstance(kept, nn.Module) else tree_leaves(kept)
    return [tuple(value.shape) for value in values if isinstance(value, DTensor)]


def _whole(now: Tensor, whole: Tensor, original: nn.Parameter | None) -> Tensor:
    if not isinstance(now, nn.Parameter):
        return whole
    if original is None:
        return nn.Parameter(whole, requires_grad=now.requires_grad)
    original.data, original.grad = whole, None
    return original.requires_grad_(now.requires_grad)


def _modules_of(owners: Iterable[object], module: nn.Module) -> dict[str, nn.Module]:
    """Copies and averages of modules that callbacks keep, by the callback and its attribute."""
    found: dict[str, nn.Module] = {}
    for index, owner in enumerate(owners):
        for name, value in getattr(owner, "__dict__", {}).items():
            value = value.module if isinstance(value, AveragedModel) else value
            if isinstance(value, nn.Module) and value is not module:
                found[f"{index}.{name}"] = value
    return found


def _make_whole(copied: nn.Module) -> None:
    unsplit_copy(copied)
    made: dict[int, Tensor] = {}
    for tensors, name, _, tensor in _parts_in(copied):
        if isinstance(tensor, DTensor):
            if id(tensor) not in made:
                made[id(tensor)] = _whole(tensor, full(tensor), None)
            tensors[name] = made[id(tensor)]
