"""Installing replayed values: which tensor of a module gets which storage, and what of it a rank keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_dist.compat.distributed import param_groups_of
from lightning_dist.compat.torch import MODULE_REGISTRIES, own_buffers, own_parameters
from lightning_dist.dtensors import local_part, place_like
from lightning_dist.initialization.replay import ReplayPlan, replay
from lightning_dist.initialization.tape import CannotDefer, Slot, Tape

Take = Callable[[Tensor, str, Tensor], Tensor | None]
"""``take(full, name, current)`` returns what replaces the meta tensor ``current`` of the module."""


@dataclass(frozen=True)
class Place:
    """Where a module tree holds a tensor: a parameter, a buffer, a plain attribute, or the item ``key`` of one."""

    owner: nn.Module
    attribute: str
    tensor: Tensor
    key: Any = None

    def put(self, tensor: Tensor) -> None:
        """Replaces the tensor."""
        if self.key is not None:
            getattr(self.owner, self.attribute)[self.key] = tensor
        else:
            # Not into _parameters: modules such as nn.LSTM keep lists of their own, which their __setattr__ updates.
            setattr(self.owner, self.attribute, tensor)


class RecordedInit:
    """How a model would have been initialised, recorded by
    :func:`~lightning_dist.initialization.record_initialization`."""

    def __init__(self, tape: Tape, put_back: Callable[[], None]) -> None:
        self._tape, self._put_back = tape, put_back
        self._slots: dict[str, Slot] = {}

    def bind(self, module: nn.Module) -> None:
        """Remembers which tensors of a module are deferred, by name. Call it once the module is built, outside of
        the recording, and before the module is sharded: sharding replaces the parameters.

        Raises:
            CannotDefer: values of a tensor come from outside of the recording, or a deferred tensor sits in a tuple of
                the module. The generators of Python and NumPy are then put back to where the recording found them, so
                that the caller may build plainly.
        """
        try:
            self._slots = {
                name: self._tape.slot(place.tensor) for name, place in _places(module).items() if place.tensor.is_meta
            }
            self._check_tuples(module)
            self._check_known()
        except CannotDefer:
            self._put_back()
            raise

    @property
    def names(self) -> list[str]:
        """Names of the deferred parameters, buffers and other tensors of the module."""
        return list(self._slots)

    def has_all_of(self, module: nn.Module) -> bool:
        """Whether what a module has on the meta device was remembered of it, by names and sizes."""
        sizes = {name: tuple(place.tensor.shape) for name, place in _deferred(module, True).items()}
        return bool(sizes) and sizes.items() <= {name: slot.size for name, slot in self._slots.items()}.items()

    def materialize(
        self,
        module: nn.Module,
        take: Take | None = None,
        device: torch.device | str | None = None,
        parameters: bool = True,
    ) -> None:
        """Replays the initialisation and gives each meta tensor of the module its values.

        All random numbers of plain building are drawn, in its order, by the same generators from the states in
        which the recording found them. So values are bitwise those of plain building on the same devices, and the
        generators end as it would have left them. At a time, memory holds what was taken, the tensor in work, and
        tensors that a later step of the initialisation reads.

        Args:
            module: the bound module or a part of it whose names are the same, sharded or not. Tensors of the bound
                module that it does not have are drawn and dropped.
            take: ``take(full, name, current)`` gets the full values of one tensor, its first name and the meta
                tensor (or DTensor over one) in the module, and returns the tensor to install, or ``None`` if it
                installed one itself. Tensors that the module holds under many names are taken once and stay
                tied. Default: :func:`keep_shard`.
            device: where :func:`keep_shard` puts tensors that are no DTensor; default: where they were built.
            parameters: False to leave parameters deferred, and give values to buffers and other tensors only.

        Communication: none; every rank draws all values.

        Raises:
            RuntimeError: a parameter, buffer or attribute is still on the meta device; the message has the names.
        """
        places = _deferred(module, parameters)
        users: dict[int, list[str]] = {}
        for name in places:
            if name in self._slots:
                users.setdefault(self._slots[name].storage, []).append(name)

        def hand_over(storage: int, values: torch.UntypedStorage) -> None:
            for names in _tied(users[storage], places):
                full = self._slots[names[0]].view(values)
                current = places[names[0]].tensor
                kept = take(full, names[0], current) if take else keep_shard(full, names[0], current, device)
                if kept is not None:
                    _install(kept, current, [places[name] for name in names])

        replay(self._tape, ReplayPlan.of(self._tape, users), hand_over)
        _refresh_fsdp(module)
        left = list(_deferred(module, parameters))
        if left:
            raise RuntimeError(
                f"still on the meta device after materialize: {', '.join(left)}. They were not in the module when "
                "bind() was called, or take() installed nothing; bind the finished module before sharding it"
            )

    def materialize_shapes(self, module: nn.Module, full: Callable[..., Tensor], device: torch.device | None) -> None:
        """As :meth:`materialize`, with ``full(size, stride, dtype=, device=)`` in place of a parameter's values."""
        self.materialize(module, None, device, parameters=False)
        places = _deferred(module, True)
        for names in _tied(list(places), places):
            current, slot = places[names[0]].tensor, self._slots[names[0]]
            built_on = self._tape.storages[slot.storage].device
            whole = full(slot.size, slot.stride, dtype=slot.dtype, device=built_on)
            _install(keep_shard(whole, names[0], current, device), current, [places[name] for name in names])
        _refresh_fsdp(module)

    def _check_known(self) -> None:
        plan = ReplayPlan.of(self._tape, {slot.storage for slot in self._slots.values()})
        if plan.unknown:
            names = [name for name, slot in self._slots.items() if slot.storage in plan.unknown]
            readers = [str(step.function) for step in self._tape.steps if step.reads & plan.unknown]
            what = ", ".join(names) or f"a tensor that {readers[0]} reads"
            raise CannotDefer(
                f"nothing is known about the values of {what} (made on the meta device explicitly, before the "
                "recording, or by code that torch does not see)"
            )

    def _check_tuples(self, module: nn.Module) -> None:
        for owner in module.modules():
            for attribute, value in vars(owner).items():
                items = value if isinstance(value, tuple) else ()
                if any(isinstance(item, Tensor) and item.is_meta for item in items):
                    raise CannotDefer(
                        f"{type(owner).__name__} keeps a tensor in the tuple {attribute!r}, whose items can't be "
                        "replaced; register it as a buffer"
                    )


def keep_shard(
    full: Tensor,
    name: str,
    current: Tensor,
    device: torch.device | str | None = None,
    of_shards: torch.device | None = None,
) -> Tensor | None:
    """What a rank keeps of a tensor: all of it, or its slice if the module's tensor is a DTensor.

    Args:
        full: the values of the whole tensor.
        name: its name.
        current: the meta tensor in the module, which has the placements.
        device: where it goes; default: where it is, and a slice to the device of its mesh.
        of_shards: where slices go, if elsewhere.

    Communication: none; the slice is cut out locally.
    """
    if isinstance(current, DTensor):
        return place_like(full, current, of_shards or device or current.device_mesh.device_type)
    return full if device is None else full.to(device)


def _deferred(module: nn.Module, parameters: bool) -> dict[str, Place]:
    """The places on the meta device."""
    places = {name: place for name, place in _places(module).items() if local_part(place.tensor).is_meta}
    return {name: place for name, place in places.items() if parameters or not isinstance(place.tensor, nn.Parameter)}


def _install(kept: Any, current: Tensor, places: list[Place]) -> None:
    if isinstance(current, nn.Parameter):
        if not isinstance(kept, nn.Parameter):
            kept = nn.Parameter(kept.detach(), current.requires_grad)
        kept.__dict__.update(current.__dict__)  # marks that models put on their parameters
    elif current.requires_grad and current.is_leaf:
        kept = kept.detach().requires_grad_()
    for place in places:
        place.put(kept)


def _tied(names: list[str], places: dict[str, Place]) -> list[list[str]]:
    """Names by tensor object: those of one object get one object again."""
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(id(places[name].tensor), []).append(name)
    return list(groups.values())


def _refresh_fsdp(module: nn.Module) -> None:
    """Lets fully_shard, which keeps references to its parameters (torch 2.15), take up new ones."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()
            for group in param_groups_of(child):
                for parameter in group.fsdp_params:
                    parameter.reset_sharded_param()


def _places(module: nn.Module) -> dict[str, Place]:
    """Parameters, buffers, tensor attributes and tensors in lists and dictionaries, by name, all names of tied ones.

    A parameter in a list counts only as another name of a registered one: after sharding, lists keep the old object.
    """
    places, items = dict[str, Place](), dict[str, Place]()
    for prefix, owner in module.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        attributes = {key: value for key, value in vars(owner).items() if isinstance(value, Tensor)}
        for attribute, tensor in (own_parameters(owner) | own_buffers(owner) | attributes).items():
            if tensor is not None:
                places[start + attribute] = Place(owner, attribute, tensor)
        for attribute, key, tensor in _items(owner):
            items[f"{start}{attribute}[{key!r}]"] = Place(owner, attribute, tensor, key)
    registered = {id(place.tensor) for place in places.values()}
    for name, place in items.items():
        if not isinstance(place.tensor, nn.Parameter) or id(place.tensor) in registered:
            places[name] = place
    return places


def _items(owner: nn.Module) -> Iterator[tuple[str, Any, Tensor]]:
    """Tensors in the lists and dictionaries of a module, with attribute and key."""
    for attribute, value in vars(owner).items():
        if isinstance(value, (dict, list)) and attribute not in MODULE_REGISTRIES:
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((attribute, key, item) for key, item in pairs if isinstance(item, Tensor))
