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

from lightning_dist.parallel.pipeline.stage_owner import StageOwner, staged
from lightning_dist.parallel.pipeline.stages import Pipeline
from lightning_dist.parallel.rehearsal import is_users_object
from lightning_dist.placeholder import is_placeholder, placeholder
from lightning_dist.pytree import deep_leaves, deep_map

Place = tuple[str, Any]
"""The name of an attribute, and None for itself or the key of what it holds; or of a part, and of its attribute."""


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
    numbers: dict[Place, Any] = field(default_factory=dict)


class StepEffects:
    """What a step that is about to run leaves in its module, and in its parts: ``numbers``, by names of both."""

    def __init__(self, module: pl.LightningModule, numbers: Iterable[Place] = ()) -> None:
        self._lists, self._attributes = _AppendedLists(module), _KeptAttributes(module)
        self._numbers = _KeptNumbers(module, numbers)

    def before_microbatch(self) -> None:
        """A stage begins a microbatch: what it finds in the module is from before the step."""
        self._lists.before_microbatch()
        self.put_back()

    def put_back(self) -> None:
        self._attributes.put_back()
        self._numbers.put_back()

    def after_microbatch(self) -> None:
        self._lists.after_microbatch()
        self._attributes.after_microbatch()

    def forget(self) -> None:
        self._attributes.put_back()
        self._lists.forget()

    def joined(self, sizes: list[int], weights: list[float]) -> Effects:
        """What one step over the whole batch would leave, on the last stage's rank; uneven microbatches are refused."""
        lists = self._lists.joined(sizes, weights)
        return Effects(lists, self._attributes.joined(sizes, weights), self._numbers.changed())

    def leave(self, effects: Effects) -> None:
        self._lists.extend(effects.lists)
        self._attributes.keep(effects.attributes)
        self._numbers.put(effects.numbers)


class _AppendedLists:
    """What a step appends to lists that are attributes of its module, or in dictionaries and objects that are."""

    def __init__(self, module: pl.LightningModule) -> None:
        self._lists: dict[Place, list[Any]] = {at: value for at, value in _places(module) if type(value) is list}
        self._begin = self._at = self._lengths()
        self._added: dict[Place, list[list[Any]]] = {place: [] for place in self._lists}

    def _lengths(self) -> dict[Place, int]:
        return {place: len(items) for place, items in self._lists.items()}

    def before_microbatch(self) -> None:
        self._at = self._lengths()

    def after_microbatch(self) -> None:
        """Takes what it appended off the lists, and keeps it."""
        for place, items in self._lists.items():
            self._added[place].append(items[self._at[place] :])
            del items[self._at[place] :]

    def forget(self) -> None:
        for place, items in self._lists.items():
            del items[self._begin[place] :]

    def joined(self, sizes: list[int], weights: list[float]) -> dict[Place, list[Any]]:
        found: dict[Place, list[Any]] = {}
        for place, added in self._added.items():
            if len({len(items) for items in added}) > 1:
                raise _uneven("appends to", place, "it would have appended for")
            if any(added):
                columns = zip(*added, strict=True)
                found[place] = [_joined(list(map(detached, column)), sizes, weights) for column in columns]
        return found

    def extend(self, found: dict[Place, list[Any]]) -> None:
        """Appends it, but where this rank's own stages have appended: what hooks of its layers saw stays its own."""
        for place, items in found.items():
            if place in self._lists and len(self._lists[place]) == self._begin[place]:
                self._lists[place].extend(items)


class _KeptAttributes:
    """What a step puts into attributes of its module, or into dictionaries and objects of the user's there. Each
    microbatch finds them as they were before the step; afterwards they are what one step over the whole batch would
    have left: joined as what a step returns is.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._module, self._own = module, vars(module)
        self._before = dict(_places(module))
        self._added: list[dict[Place, Any]] = []

    def _changed(self) -> dict[Place, Any]:
        return {
            place: value
            for place, value in _places(self._module)
            if value is not self._before.get(place, _NOTHING)
            and (place[1] is None or (place[0], None) in self._before)  # else of a dictionary that is new
            and _is_plain(value)
            and _is_plain(self._before.get(place))
        }

    def put_back(self) -> None:
        for name, key in self._changed():
            owner, place = self._owner(name, key)
            if (name, key) in self._before:
                owner[place] = self._before[name, key]
            else:
                del owner[place]

    def after_microbatch(self) -> None:
        self._added.append({place: detached(value) for place, value in self._changed().items()})

    def joined(self, sizes: list[int], weights: list[float]) -> dict[Place, Any]:
        found: dict[Place, Any] = {}
        for place in {place: None for added in self._added for place in added}:
            values = [added[place] for added in self._added if place in added]
            if len(values) < len(self._added):
                raise _uneven("sets", place, "it would be after")
            found[place] = _joined(values, sizes, weights)
        return found

    def keep(self, found: dict[Place, Any]) -> None:
        """Puts what the last stage kept in place, on every rank; activations of other stages as what is elsewhere."""
        self.put_back()
        for (name, key), value in found.items():
            owner, place = self._owner(name, key)
            owner[place] = deep_map(value, partial(_there, name))

    def _owner(self, name: str, key: Any) -> tuple[dict[Any, Any], Any]:
        """The dictionary that has it, and its key there."""
        items = None if key is None else _held_items(self._own[name])
        return (self._own if items is None else items), (name if key is None else key)


class _KeptNumbers:
    """Numbers that a step puts into attributes of the module's parts; None where one is not there."""

    def __init__(self, module: nn.Module, places: Iterable[Place]) -> None:
        self._module, self._places = module, list(places)
        self._before = self._now()

    def _now(self) -> dict[Place, Any]:
        return {place: vars(self._module.get_submodule(place[0])).get(place[1]) for place in self._places}

    def put_back(self) -> None:
        self.put(self._before)

    def put(self, values: dict[Place, Any]) -> None:
        for (name, attribute), value in values.items():
            own = vars(self._module.get_submodule(name))
            if value is None:
                own.pop(attribute, None)
            else:
                own[attribute] = value

    def changed(self) -> dict[Place, Any]:
        return {place: value for place, value in self._now().items() if value != self._before[place]}


_NOTHING = object()


def _places(module: nn.Module) -> Iterator[tuple[Place, Any]]:
    """The user's attributes of a module, and what is in dictionaries and objects among them."""
    for name, value in list(vars(module).items()):
        if name.startswith("_") or name == "training":
            continue
        yield (name, None), value
        if (items := _held_items(value)) is not None:
            yield from (((name, key), item) for key, item in items.items())


def _held_items(value: Any) -> dict[Any, Any] | None:
    """The dictionary that has the items of a dictionary, or of an object of the user's; None for anything else."""
    if type(value) is dict:
        return value
    return vars(value) if is_users_object(value) else None


def _is_plain(value: Any) -> bool:
    kinds = (type(None), bool, int, float, complex, str, Tensor)
    return all(isinstance(leaf, kinds) and not isinstance(leaf, nn.Parameter) for leaf in deep_leaves(value))


def _uneven(does: str, place: Place, unknown: str) -> RuntimeError:
    return RuntimeError(
        f"pp: the step {does} {place[0]!r} for some of its microbatches, and not for others, so that it can't be said "
        f"what {unknown} the whole batch; use num_microbatches=1"
    )


def detached(value: Any) -> Any:
    """Without a graph."""
    return deep_map(value, lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf)


def _joined(values: list[Any], sizes: list[int], weights: list[float]) -> Any:
    """What microbatches left: once if they left the same, else as what steps return."""
    first = values[0]
    if isinstance(first, (bool, int, float, str)) and all(value == first for value in values):
        return first
    are_tensors = all(isinstance(v, Tensor) and not is_placeholder(v) for v in values)
    if are_tensors and not _by_sample(values, sizes) and all(torch.equal(value, first) for value in values[1:]):
        return first
    return joined(values, sizes, weights)


def _by_sample(values: list[Tensor], sizes: list[int]) -> bool:
    return all(v.ndim and v.shape[0] == size for v, size in zip(values, sizes, strict=True))


def joined(outputs: list[Any], sizes: list[int], weights: list[float]) -> Any:
    """What the steps of all microbatches returned, as one.

    Tensors with the microbatch in their first dim are joined; numbers become their mean, weighted; lists of the
    microbatch's length are joined; dictionaries and sequences item by item. What is neither is given as the list of
    what the microbatches gave, and None where all gave None.
    """
    first = outputs[0]
    if all(output is None for output in outputs):
        return None
    if all(isinstance(output, Tensor) for output in outputs):
        if _by_sample(outputs, sizes):
            return torch.cat(outputs)
        return weighted_mean(outputs, weights) if first.numel() == 1 else outputs
    if all(isinstance(output, dict) and output.keys() == first.keys() for output in outputs):
        return {key: joined([output[key] for output in outputs], sizes, weights) for key in first}
    if all(type(output) in (list, tuple) for output in outputs):
        lengths = [len(output) for output in outputs]
        if lengths == sizes and not any(isinstance(v, Tensor) for output in outputs for v in output):
            return type(first)(item for output in outputs for item in output)
        if len(set(lengths)) == 1:
            return type(first)(joined(list(column), sizes, weights) for column in zip(*outputs, strict=True))
    if all(isinstance(output, (int, float)) and not isinstance(output, bool) for output in outputs):
        return sum(o * weight for o, weight in zip(outputs, weights, strict=True) if weight) / (sum(weights) or 1)
    return outputs


def weighted_mean(values: list[Tensor], weights: list[float] | list[int]) -> Tensor:
    """The mean of equally shaped tensors, weighted; in their own dtype where it is floating point."""
    total = float(sum(weights))
    if len(values) == 1 or not total:
        return values[0].detach()
    wide = [v.detach().double() if v.device.type != "mps" else v.detach().float() for v in values]
    mean = sum(v * (w / total) for v, w in zip(wide, weights, strict=True) if w)
    assert isinstance(mean, Tensor)
    return mean.to(values[0].dtype) if values[0].is_floating_point() else mean.float()


class _Elsewhere:
    """In what is sent, in place of a tensor of another stage."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype


def _there(name: str, leaf: Any) -> Any:
    if not isinstance(leaf, _Elsewhere):
        return leaf
    tensor = placeholder(torch.empty(leaf.shape, dtype=leaf.dtype, device="meta"), torch.device("cpu"))
    return staged(tensor, StageOwner(name, -1, None, False))


def marked(value: Any) -> Any:
    """With marks in place of tensors of other stages, to be put into a module by :meth:`StepEffects.leave`."""
    return deep_map(value, lambda leaf: _Elsewhere(tuple(leaf.shape), leaf.dtype) if is_placeholder(leaf) else leaf)


def pack(output: Any, effects: Effects) -> bytes:
    """What a step returned and leaves, for :func:`share`; empty for nothing."""
    value = [output, *(list(held.items()) for held in (effects.lists, effects.attributes, effects.numbers))]
    if all(leaf is None for leaf in deep_leaves(value)):
        return b""
    buffer = io.BytesIO()
    torch.save(deep_map(value, lambda leaf: None if is_placeholder(leaf) else leaf), buffer)
    return buffer.getvalue()


def share(payload: bytes, size: int, pipeline: Pipeline) -> tuple[Any, Effects]:
    """What the rank of the last stage packed. Communication: one broadcast of ``size`` bytes over the pipeline."""
    if pipeline.has_last:
        data = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(pipeline.device)
    else:
        data = torch.empty(size, dtype=torch.uint8, device=pipeline.device)
    dist.broadcast(data, group=pipeline.group, group_src=pipeline.stages.last_rank)
    there = io.BytesIO(data.cpu().numpy().tobytes())
    output, *items = torch.load(there, map_location=pipeline.device, weights_only=False)
    return output, Effects(*map(dict, items))
