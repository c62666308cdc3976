"""Parameters of a pipeline's stages in the user's hands: each stands for the whole, on every rank.

[Note: what a stage holds]
A rank of a pipeline holds the parameters of its stages; in place of the others it has tensors without memory, so that
``parameters()``, names and an optimizer's groups are whole. Hooks, callbacks and optimizers go through all of them, on
every rank alike. What they do element by element (in place or not, with numbers, with tensors of the same stage) runs
where the tensor is, and nothing is communicated. What asks for a number (a norm, ``.item()``, a matrix product), and
what pairs tensors of two stages, is sent from the rank that holds it. Random numbers that a tensor of another stage
would be given are drawn and dropped, so that the streams of the ranks stay alike. In a step, and while an optimizer
steps, they are parameters and tensors without memory, and nothing else.

Under ``tp`` and ``dp_shard`` the rank that holds a parameter has a part of it; there what would be sent is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_dist.divided.functions import Way, name_of, way_of, writes
from lightning_dist.divided.readers import meet
from lightning_dist.placeholder import is_placeholder, placeholder, placeholder_parameter

_DEEPEST = 60
"""Calls to look at."""

_STAGE = "_stage"
"""Attribute of a staged tensor: its :class:`Place`."""


class Place:
    """Where a parameter is.

    Args:
        name: of the parameter.
        source: the first rank of the group that holds it.
        group: the ranks of the pipeline; None where what they hold can't be sent.
    """

    def __init__(self, name: str, source: int, group: dist.ProcessGroup | None) -> None:
        self.name, self.source, self.group = name, source, group

    def __deepcopy__(self, _: Any) -> Place:
        return self

    def __reduce__(self) -> Any:
        return Place, (self.name, self.source, None)  # a group is this process's


class _Staged:
    """What all kinds have in common."""

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        way = way_of(func)
        with torch._C.DisableTorchFunctionSubclass():
            if way is Way.ASK or _closed or (line := _line_of_user(sys._getframe(1))) is None:
                return func(*args, **kwargs)
            return _WAYS.get(way, _on_whole)(func, args, kwargs, line)


class Elsewhere(_Staged, FakeTensor):
    """A parameter of another stage, or what is computed of it; see [Note: what a stage holds]."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        if _closed or (line := _line_of_user(sys._getframe(1))) is None:
            return super().__reduce_ex__(protocol)
        return _plain(self, "pickle", line).__reduce_ex__(protocol)


class HereParameter(_Staged, nn.Parameter):
    """A parameter of this rank's stages."""


class Here(_Staged, Tensor):
    """A gradient of one, or what is computed of it."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)


_CLASSES: dict[type, type] = {FakeTensor: Elsewhere, nn.Parameter: HereParameter, Tensor: Here}
_closed: list[None] = []
"""While not empty, staged tensors are what they are without their classes."""


def staged(tensor: Any, place: Place) -> Any:
    """Makes a tensor stand for that of a place, in place; anything else as it is."""
    kind = _CLASSES.get(type(tensor))
    if kind is not None:
        tensor.__class__ = kind
        vars(tensor)[_STAGE] = place
    return tensor


def plain_again(parameters: Iterable[nn.Parameter]) -> list[Any]:
    """Gives parameters of this rank's stages torch's class; returns those that had ours."""
    found: list[Any] = [p for p in parameters if type(p) is HereParameter]
    for parameter in found:
        parameter.__class__ = nn.Parameter
    return found


@contextmanager
def closed(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """While it lasts, these parameters are torch's own, and those of other stages tensors without memory."""
    found = plain_again(parameters)
    _closed.append(None)
    try:
        yield
    finally:
        _closed.pop()
        for parameter in found:
            parameter.__class__ = HereParameter


@contextmanager
def opened(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside of :func:`closed`: staged tensors stand for the whole again."""
    before = _closed[:]
    _closed.clear()
    found = [p for p in parameters if type(p) is nn.Parameter and _STAGE in vars(p)]
    for parameter in found:
        parameter.__class__ = HereParameter
    try:
        yield
    finally:
        plain_again(found)
        _closed[:] = before


# ------------------------------------------------------------------ ways


def _alias(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    place = _place(_staged_in(args, kwargs)[0])
    try:
        return tree_map(lambda leaf: staged(leaf, place), func(*args, **kwargs))
    except Exception:
        if not any(is_placeholder(leaf) for leaf in tree_leaves((args, kwargs))):
            raise
        return _on_whole(func, args, kwargs, line)  # an index whose size depends on values


def _create(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    return func(*_with_memory(args), **_with_memory(kwargs))


def _gradient(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    gradient = func(*args, **kwargs)
    return gradient if gradient is None else staged(gradient, _place(args[0]))


def _set_gradient(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    target, value = args
    value = _for(target, value, "the gradient of a parameter of this stage is set to", line)
    if is_placeholder(target) and isinstance(value, Tensor) and not is_placeholder(value):
        value = placeholder(value)
    return func(target, value)


def _set_data(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    target, value = args
    value = _for(target, value, "assigned to `.data`, is", line)
    if not is_placeholder(target):
        with torch.no_grad():
            return func(target, value.as_subclass(Tensor) if isinstance(value, Tensor) else value)
    return None


def _gradient_hook(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    raise RuntimeError(
        f"pp: {_where(line)}: a hook on the gradient of {_place(args[0]).name} would see that of each microbatch; use "
        "on_after_backward or on_before_optimizer_step"
    )


def _copy(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    tensor, memo = args[0], args[1] if len(args) > 1 else kwargs.get("memo", {})
    if id(tensor) in memo:
        return memo[id(tensor)]
    if is_placeholder(tensor):
        copied: Any = placeholder_parameter(tensor)
    else:
        values = tensor.detach().clone()
        copied = nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
        vars(copied).update(vars(tensor))
    memo[id(tensor)] = staged(copied, _place(tensor))
    return copied


def _draw(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    tensors = _staged_in(args, kwargs)
    place = _place(tensors[0])
    if any(is_placeholder(tensor) for tensor in tensors):
        with torch.no_grad():
            drawn = func(*_with_memory(args), **_with_memory(kwargs))  # and dropped
        return args[0] if writes(func) and args else staged(placeholder(drawn), place)
    return tree_map(lambda leaf: staged(leaf, place), func(*args, **kwargs))


def _elementwise(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    first = args[0] if args else None
    if isinstance(first, (list, tuple)):
        return _row_by_row(func, args, kwargs, line)
    changes = writes(func)
    if (changes and not isinstance(first, _Staged)) or "out" in kwargs:
        return _on_whole(func, args, kwargs, line)
    like = first if changes else _staged_in(args, kwargs)[0]
    what = f"meets, in {name_of(func)},"
    args, kwargs = tree_map(lambda leaf: _for(like, leaf, what, line), (tuple(args), dict(kwargs)))
    return tree_map(lambda leaf: staged(leaf, _place(like)), func(*args, **kwargs))


def _row_by_row(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    """``foreach`` functions: of each stage's rows together."""
    length = len(args[0])
    lists = [v for v in (*args, *kwargs.values()) if isinstance(v, (list, tuple)) and len(v) == length]
    lists = [values for values in lists if isinstance(values[0], Tensor)]
    what = f"meets, in {name_of(func)},"
    rows: list[list[Any]] = []
    for row in zip(*lists, strict=True):
        if writes(func) and not isinstance(row[0], _Staged):
            rows.append([_whole(leaf, what, line) for leaf in row])
        else:
            like = next((leaf for leaf in row if isinstance(leaf, _Staged)), row[0])
            rows.append([_for(like, leaf, what, line) if isinstance(like, _Staged) else leaf for leaf in row])
    columns = {id(values): [row[place] for row in rows] for place, values in enumerate(lists)}
    results: dict[int, Any] = {}
    for there in (False, True):
        indices = [index for index, row in enumerate(rows) if is_placeholder(row[0]) is there]

        def of_rows(value: Any, indices: list[int] = indices) -> Any:
            if id(value) in columns:
                return [columns[id(value)][index] for index in indices]
            is_row = isinstance(value, (list, tuple)) and len(value) == length
            return [value[index] for index in indices] if is_row else value

        if indices:
            part = func(*map(of_rows, args), **{name: of_rows(value) for name, value in kwargs.items()})
            if isinstance(part, (list, tuple)):
                results.update(zip(indices, part, strict=True))
    if writes(func) or not results:
        return args[0] if results else None
    places = [next((_place(leaf) for leaf in row if isinstance(leaf, _Staged)), None) for row in rows]
    return [results[i] if place is None else staged(results[i], place) for i, place in enumerate(places)]


def _number(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    """A sum or a norm: computed where the tensor is, and sent."""
    first = args[0] if args else None
    if isinstance(first, (list, tuple)):
        return [_number(lambda t: func([t], *args[1:], **kwargs)[0], (tensor,), {}, line) for tensor in first]
    if not isinstance(first, _Staged):
        return func(*args, **kwargs) if not _staged_in(args, kwargs) else _on_whole(func, args, kwargs, line)
    result = func(*args, **kwargs)
    if not isinstance(result, Tensor):
        return _on_whole(func, args, kwargs, line)
    return _sent(result.detach(), _place(first), name_of(func) or "number", line)


def _on_whole(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    """Anything else: on tensors that every rank is given; what it changes in place is written back where it is."""
    what = name_of(func) or str(func)
    wholes: dict[int, Tensor] = {}

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, _Staged):
            return leaf
        if id(leaf) not in wholes:
            wholes[id(leaf)] = _whole(leaf, what, line)
        return wholes[id(leaf)]

    whole_args, whole_kwargs = tree_map(whole, (list(args), dict(kwargs)))
    result = func(*whole_args, **whole_kwargs)
    first = args[0] if args else None
    if not writes(func) or not isinstance(first, _Staged):
        return result
    if not is_placeholder(first):
        with torch.no_grad():
            first.detach().copy_(wholes[id(first)])  # type: ignore[attr-defined]
    return first if result is wholes[id(first)] else result


_WAYS: dict[Way, Callable[[Any, Any, Any, FrameType], Any]] = {
    Way.ALIAS: _alias,
    Way.VIEW: _alias,
    Way.CREATE: _create,
    Way.GRADIENT: _gradient,
    Way.SET_GRADIENT: _set_gradient,
    Way.SET_DATA: _set_data,
    Way.GRADIENT_HOOK: _gradient_hook,
    Way.COPY: _copy,
    Way.DRAW: _draw,
    Way.ELEMENTWISE: _elementwise,
    Way.SUM: _number,
    Way.NORM: _number,
}


# ------------------------------------------------------------------ between stages


def _for(target: Any, leaf: Any, what: str, line: FrameType) -> Any:
    """An argument beside a staged tensor: as it is if it is of the same place or of none, else sent."""
    if not isinstance(leaf, _Staged) or leaf is target or not isinstance(target, _Staged):
        return leaf
    return leaf if _place(leaf).source == _place(target).source else _whole(leaf, what, line)


def _whole(leaf: Any, what: str, line: FrameType) -> Any:
    if not isinstance(leaf, _Staged):
        return leaf
    assert isinstance(leaf, Tensor)
    return _sent(leaf.detach(), _place(leaf), what, line)


def _plain(leaf: Tensor, what: str, line: FrameType) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return _whole(leaf, what, line)


def _sent(tensor: Tensor, place: Place, what: str, line: FrameType) -> Tensor:
    """A tensor that the place's rank has. Communication: one broadcast over the pipeline.

    Raises:
        RuntimeError: it can't be sent, or not all ranks ask.
    """
    if place.group is None or not dist.is_initialized():
        raise RuntimeError(
            f"pp: {_where(line)}: {what} {place.name}, which another stage holds: this rank knows its shape only. "
            "Outside of steps, code under pp with tp or dp_shard, or after the process group is gone, may go through "
            "parameters element by element, each with those of its own stage; for the norm of all gradients there is "
            "gradient_clip_val=; else use another axis"
        )
    meet(line, dist.get_process_group_ranks(place.group))
    is_source = dist.get_rank(place.group) == place.source
    if is_source:
        value = tensor.as_subclass(Tensor).contiguous().clone()
    else:
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    dist.broadcast(value, group=place.group, group_src=place.source)
    return value


def _with_memory(value: Any) -> Any:
    def real(leaf: Any) -> Any:
        return torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device) if is_placeholder(leaf) else leaf

    return tree_map(real, value if isinstance(value, dict) else tuple(value))


def _staged_in(args: Any, kwargs: Any) -> list[Any]:
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _Staged)]


def _place(tensor: Any) -> Place:
    return vars(tensor)[_STAGE]


def _where(line: FrameType) -> str:
    return f"{line.f_code.co_qualname}, line {line.f_lineno}"


def _line_of_user(frame: FrameType | None) -> FrameType | None:
    """The innermost that is no library's; None where Lightning, this package or an optimizer asks."""
    for _ in range(_DEEPEST):
        if frame is None:
            return None
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith(_ALLOWED):
            return None
        if frame.f_code.co_varnames[:1] == ("self",) and isinstance(frame.f_locals.get("self"), torch.optim.Optimizer):
            return None
        if name.partition(".")[0] not in _LIBRARIES:
            return frame
        frame = frame.f_back
    return None


_ALLOWED = (
    "lightning_dist.",
    "lightning.pytorch.loops",
    "lightning.pytorch.trainer",
    "lightning.pytorch.strategies",
    "lightning.pytorch.utilities.model_summary",
)
"""Whose own code asks for what it may."""

_LIBRARIES = {
    "contextlib",
    "copy",
    "functools",
    "torch",
    "lightning",
    "lightning_fabric",
    "torchmetrics",
    "abc",
    "pickle",
}
