"""What a step returns and appends to lists of its module is on every rank of the pipeline, as in one process.

[Note: what the last stage made]
A step's tail runs on the last stage only, once a microbatch. What it returned there, and what it appended to lists
(``self.outputs.append(...)``, read in ``on_validation_epoch_end``), is joined over the microbatches and sent to the
other ranks of the axis with the loss. Where there is nothing of the kind nothing more is sent.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dist.parallel.pipeline.joined_outputs import joined
from lightning_dist.parallel.pipeline.plain_values import held_items
from lightning_dist.parallel.pipeline.stage_owner import StageOwner, staged
from lightning_dist.placeholder import is_placeholder, placeholder
from lightning_dist.pytree import deep_leaves, deep_map

Place = tuple[str, Any]


class AppendedLists:
    """Lists that are attributes of a module, or in dictionaries and objects that are, and what a step appends to them.

    Args:
        module: whose step is about to run.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._lists: dict[Place, list[Any]] = {}
        for name, value in vars(module).items():
            if name.startswith("_"):
                continue
            if type(value) is list:
                self._lists[name, None] = value
            elif (items := held_items(value)) is not None:
                self._lists.update({(name, key): item for key, item in items.items() if type(item) is list})
        self._begin = {place: len(items) for place, items in self._lists.items()}
        self._at = dict(self._begin)
        self._added: dict[Place, list[list[Any]]] = {place: [] for place in self._lists}

    def before_microbatch(self) -> None:
        """A stage begins a microbatch."""
        self._at = {place: len(items) for place, items in self._lists.items()}

    def after_microbatch(self) -> None:
        """The last stage has ended one: takes what it appended off the lists, and keeps it."""
        for place, items in self._lists.items():
            self._added[place].append(items[self._at[place] :])
            del items[self._at[place] :]

    def forget(self) -> None:
        """Takes off what was appended."""
        for place, items in self._lists.items():
            del items[self._begin[place] :]

    def joined(self, sizes: list[int], weights: list[float]) -> dict[Place, list[Any]]:
        """What one step over the whole batch would have appended.

        Raises:
            RuntimeError: some microbatches appended more than others.
        """
        found: dict[Place, list[Any]] = {}
        for place, added in self._added.items():
            if not any(added):
                continue
            if len({len(items) for items in added}) > 1:
                raise RuntimeError(
                    f"pp: the step appends to {place[0]!r} for some of its microbatches, and not for others, so that "
                    "it can't be said what it would have appended for the whole batch; use num_microbatches=1"
                )
            found[place] = [
                _joined([detached(i) for i in column], sizes, weights) for column in zip(*added, strict=True)
            ]
        return found

    def extend(self, found: dict[Place, list[Any]]) -> None:
        """Appends it, but where this rank's own stages have appended: what hooks of its layers saw stays its own."""
        for place, items in found.items():
            if place in self._lists and len(self._lists[place]) == self._begin[place]:
                self._lists[place].extend(items)


class KeptAttributes:
    """What a step puts into attributes of its module, or into dictionaries and objects of the user's there.

    Each microbatch finds them as they were before the step; afterwards they are what one step over the whole batch
    would have left: joined as what a step returns is.

    Args:
        module: whose step is about to run.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._own = vars(module)
        self._before = dict(self._places())
        self._added: list[dict[Place, Any]] = []

    def _places(self) -> Iterator[tuple[Place, Any]]:
        for name, value in list(self._own.items()):
            if name.startswith("_") or name == "training":
                continue
            yield (name, None), value
            if (items := held_items(value)) is not None:
                yield from (((name, key), item) for key, item in items.items())

    def _changed(self) -> dict[Place, Any]:
        return {
            place: value
            for place, value in self._places()
            if value is not self._before.get(place, _NOTHING)
            and not (place[1] is not None and (place[0], None) not in self._before)  # of a dictionary that is new
            and _is_plain(value)
            and _is_plain(self._before.get(place))
        }

    def before_microbatch(self) -> None:
        """Puts them back."""
        for name, key in self._changed():
            owner = self._owner(name, key)
            if (name, key) in self._before:
                owner[name if key is None else key] = self._before[name, key]
            else:
                del owner[name if key is None else key]

    def after_microbatch(self) -> None:
        """The last stage has ended one."""
        self._added.append({place: detached(value) for place, value in self._changed().items()})

    def joined(self, sizes: list[int], weights: list[float]) -> dict[Place, Any]:
        """What one step over the whole batch would have left.

        Raises:
            RuntimeError: some microbatches keep what others don't.
        """
        found: dict[Place, Any] = {}
        for place in {place: None for added in self._added for place in added}:
            values = [added[place] for added in self._added if place in added]
            if len(values) < len(self._added):
                raise RuntimeError(
                    f"pp: the step sets {place[0]!r} for some of its microbatches, and not for others, so that it "
                    "can't be said what it would be after the whole batch; use num_microbatches=1"
                )
            found[place] = _joined(values, sizes, weights)
        return found

    def keep(self, found: dict[Place, Any]) -> None:
        """Puts what the last stage kept in place, on every rank; activations of other stages as what is elsewhere."""
        self.before_microbatch()
        for (name, key), value in found.items():
            self._owner(name, key)[name if key is None else key] = deep_map(value, partial(_there, name))

    def _owner(self, name: str, key: Any) -> dict[Any, Any]:
        items = None if key is None else held_items(self._own[name])
        return self._own if items is None else items


class KeptNumbers:
    """Numbers that a step puts into attributes of the module's parts.

    Args:
        module: whose step is about to run.
        places: names of the parts and of their attributes.
    """

    def __init__(self, module: nn.Module, places: Iterable[tuple[str, str]]) -> None:
        self._module = module
        self._before = {place: self._now(place) for place in places}

    def _now(self, place: tuple[str, str]) -> Any:
        """None where it is not there yet."""
        return vars(self._module.get_submodule(place[0])).get(place[1])

    def before_microbatch(self) -> None:
        """Puts them back."""
        self.put(self._before)

    def put(self, values: dict[tuple[str, str], Any]) -> None:
        """Gives the attributes values; None takes one away."""
        for (name, attribute), value in values.items():
            own = vars(self._module.get_submodule(name))
            if value is None:
                own.pop(attribute, None)
            else:
                own[attribute] = value

    def changed(self) -> dict[tuple[str, str], Any]:
        """Those that are others than before the step."""
        now = {place: self._now(place) for place in self._before}
        return {place: value for place, value in now.items() if value != self._before[place]}


@dataclass
class Effects:
    """What one step over the whole batch leaves in its module; see [Note: what the last stage made].

    Args:
        lists: what it appends, by the list's place.
        attributes: of the LightningModule, by their place.
        numbers: of its parts, by the part's name and the attribute's.
    """

    lists: dict[Place, list[Any]] = field(default_factory=dict)
    attributes: dict[Place, Any] = field(default_factory=dict)
    numbers: dict[tuple[str, str], Any] = field(default_factory=dict)

    def to_items(self) -> list[Any]:
        """For :func:`pack`."""
        return [list(values.items()) for values in (self.lists, self.attributes, self.numbers)]

    @classmethod
    def of_items(cls, items: Iterable[Any]) -> Effects:
        """What :meth:`to_items` gave."""
        return cls(*map(dict, items))


class StepEffects:
    """What a step over microbatches leaves in its module.

    Args:
        module: whose step is about to run.
        numbers: names of the parts that keep numbers, and of their attributes.
    """

    def __init__(self, module: pl.LightningModule, numbers: Iterable[tuple[str, str]]) -> None:
        self._lists, self._attributes = AppendedLists(module), KeptAttributes(module)
        self._numbers = KeptNumbers(module, numbers)

    def before_microbatch(self) -> None:
        """A stage begins a microbatch: what it finds in the module is from before the step."""
        self._lists.before_microbatch()
        self.put_back()

    def put_back(self) -> None:
        """Gives attributes the values from before the step."""
        self._attributes.before_microbatch()
        self._numbers.before_microbatch()

    def after_microbatch(self) -> None:
        """The last stage has ended one."""
        self._lists.after_microbatch()
        self._attributes.after_microbatch()

    def joined(self, sizes: list[int], weights: list[float]) -> Effects:
        """What one step over the whole batch would have left, on the rank of the last stage.

        Raises:
            RuntimeError: the microbatches leave different things.
        """
        lists = self._lists.joined(sizes, weights)
        return Effects(lists, self._attributes.joined(sizes, weights), self._numbers.changed())

    def leave(self, effects: Effects) -> None:
        """Puts it into the module of this rank."""
        self._lists.extend(effects.lists)
        self._attributes.keep(effects.attributes)
        self._numbers.put(effects.numbers)


_NOTHING = object()


class _Elsewhere:
    """In what is sent, in place of a tensor of another stage."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def there(self, name: str) -> Tensor:
        tensor = placeholder(torch.empty(self.shape, dtype=self.dtype, device="meta"), torch.device("cpu"))
        return staged(tensor, StageOwner(name, -1, None, False))


def _there(name: str, leaf: Any) -> Any:
    return leaf.there(name) if isinstance(leaf, _Elsewhere) else leaf


def _is_plain(value: Any) -> bool:
    kinds = (type(None), bool, int, float, complex, str, Tensor)
    return all(isinstance(leaf, kinds) and not isinstance(leaf, nn.Parameter) for leaf in deep_leaves(value))


def detached(value: Any) -> Any:
    """Without a graph."""
    return deep_map(value, lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf)


def _joined(values: list[Any], sizes: list[int], weights: list[float]) -> Any:
    first = values[0]
    if isinstance(first, (bool, int, float, str)) and all(value == first for value in values):
        return first
    if all(isinstance(v, Tensor) and not is_placeholder(v) for v in values):
        by_sample = all(v.ndim and v.shape[0] == size for v, size in zip(values, sizes, strict=True))
        if not by_sample and all(v.shape == first.shape and torch.equal(v, first) for v in values[1:]):
            return first
    return joined(values, sizes, weights)


def marked(value: Any) -> Any:
    """With marks in place of tensors of other stages; see :meth:`KeptAttributes.keep`."""
    return deep_map(value, lambda leaf: _Elsewhere(tuple(leaf.shape), leaf.dtype) if is_placeholder(leaf) else leaf)


def pack(value: Any) -> bytes:
    """For :func:`unpack` on other ranks; empty for nothing."""
    if not [leaf for leaf in deep_leaves(value) if leaf is not None]:
        return b""
    buffer = io.BytesIO()
    torch.save(deep_map(value, lambda leaf: None if is_placeholder(leaf) else leaf), buffer)
    return buffer.getvalue()


def share(payload: bytes, size: int, group: dist.ProcessGroup, source: int, device: torch.device) -> Any:
    """What the source packed. Communication: one broadcast of ``size`` bytes over the group."""
    if dist.get_rank(group) == source:
        data = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device)
    else:
        data = torch.empty(size, dtype=torch.uint8, device=device)
    dist.broadcast(data, group=group, group_src=source)
    return torch.load(io.BytesIO(data.cpu().numpy().tobytes()), map_location=device, weights_only=False)
