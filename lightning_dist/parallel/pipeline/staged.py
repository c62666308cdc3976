"""Parameters of a pipeline's stages in the user's hands: each stands for the whole, on every rank.

[Note: what a stage holds]
A rank of a pipeline holds the parameters of its stages; in place of the others it has tensors without memory, so that
``parameters()``, names and an optimizer's groups are whole. Hooks, callbacks and optimizers go through all of them, on
every rank alike. What they do element by element (in place or not, with numbers, with tensors of the same stage) runs
where the tensor is, and nothing is communicated. What asks for a number (a norm, ``.item()``, a matrix product), and
what pairs tensors of two stages, is sent from the rank that holds it. Random numbers that a tensor of another stage
would be given are drawn and dropped, so that the streams of the ranks stay alike. In a step, and while an optimizer
steps, they are parameters and tensors without memory, and nothing else.

Under ``tp`` and ``dp_shard`` the rank that holds a parameter has a part of it (a
:class:`~lightning_dist.divided.tensor.Divided`). What runs where the tensor is, runs on it as it does without stages;
what is sent is gathered first, by the ranks that hold parts. A view of it is a view of the whole there, and a copy on
the ranks of other stages.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from lightning_dist.divided.functions import Way, name_of, way_of, writes
from lightning_dist.divided.readers import meet
from lightning_dist.divided.tensor import Divided, as_divided, write_part
from lightning_dist.divided.whole import whole as gathered
from lightning_dist.placeholder import is_placeholder, placeholder, placeholder_parameter
from lightning_dist.pytree import tree_leaves, tree_map

_DEEPEST = 60
"""Calls to look at."""

_STAGE = "_stage"
"""Attribute of a staged tensor: its :class:`Place`."""


class Place:
    """Where a parameter is.

    Args:
        name: of the parameter.
        source: the first rank of the group that holds it.
        group: the ranks of the pipeline; None where there are none any more.
        divided: whether the ranks that hold it may have parts of it.
    """

    def __init__(self, name: str, source: int, group: dist.ProcessGroup | None, divided: bool) -> None:
        self.name, self.source, self.group, self.divided = name, source, group, divided

    def __deepcopy__(self, _: Any) -> Place:
        return self

    def __reduce__(self) -> Any:
        return Place, (self.name, self.source, None, self.divided)  # a group is this process's


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
                return _here(func, args, kwargs)
            if name_of(func) == "equal":
                return _equal(func, args, kwargs, line)
            return _WAYS.get(way, _on_whole)(func, args, kwargs, line)


class _Pickled:
    """The user's code pickles the whole (``torch.save`` of weights, on all ranks alike); ours, what is here."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        tensor: Any = self
        line = None if _closed else _line_of_user(sys._getframe(1))
        can_send = dist.is_initialized() and _place(self).group is not None
        if line is not None and (can_send or isinstance(self, Elsewhere)):
            with torch._C.DisableTorchFunctionSubclass():
                whole = _whole(tensor, "pickle", line)
                if isinstance(tensor, nn.Parameter):
                    whole = nn.Parameter(whole, requires_grad=tensor.requires_grad)
                return whole.__reduce_ex__(protocol)
        if isinstance(tensor, (Here, HereParameter)):
            plain = nn.Parameter if isinstance(tensor, HereParameter) else Tensor
            with torch._C.DisableTorchFunctionSubclass():
                return tensor.as_subclass(plain).__reduce_ex__(protocol)
        return super().__reduce_ex__(protocol)


class Elsewhere(_Pickled, _Staged, FakeTensor):
    """A parameter of another stage, or what is computed of it; see [Note: what a stage holds]."""


class HereParameter(_Pickled, _Staged, nn.Parameter):
    """A parameter of this rank's stages."""


class Here(_Pickled, _Staged, Tensor):
    """A gradient of one, or what is computed of it."""


class HereDivided(_Pickled, _Staged, Divided):
    """A parameter of this rank's stages of which it holds a part, its gradient, or what is computed of them."""


_CLASSES: dict[type, type] = {
    FakeTensor: Elsewhere,
    nn.Parameter: HereParameter,
    Tensor: Here,
    Divided: HereDivided,
}
_BEFORE: dict[type, type] = {HereParameter: nn.Parameter, HereDivided: Divided}
_closed: list[None] = []
"""While not empty, staged tensors are what they are without their classes."""


def staged(tensor: Any, place: Place) -> Any:
    """Makes a tensor stand for that of a place, in place; anything else as it is."""
    kind = _CLASSES.get(type(tensor))
    if kind is not None:
        tensor.__class__ = kind
        vars(tensor)[_STAGE] = place
    return tensor


class States(defaultdict[Any, Any]):
    """An optimizer's, by parameter; of a parameter of another stage, that of its rank."""

    @classmethod
    def show(cls, optimizer: torch.optim.Optimizer) -> None:
        """Puts them in place of the optimizer's own."""
        if type(optimizer.state) is defaultdict:
            optimizer.state = cls(dict, optimizer.state)

    def __getitem__(self, parameter: Any) -> Any:
        """The user's code gets what can be read, and tensors that can be written to."""
        if isinstance(parameter, _Staged) and not _closed and (line := _line_of_user(sys._getframe(1))) is not None:
            return _state_of(self.get(parameter, {}), parameter, line)
        return super().__getitem__(parameter)


def _state_of(own: dict[str, Any], parameter: Any, line: FrameType) -> Any:
    """Communication over the pipeline: one broadcast of the names, shapes and numbers."""
    place = _place(parameter)
    if place.group is None or not dist.is_initialized():
        return MappingProxyType(own)
    meet(line, dist.get_process_group_ranks(place.group))
    described: Any = {k: (tuple(v.shape), v.dtype) if isinstance(v, Tensor) else (v,) for k, v in own.items()}
    box = [described]
    dist.broadcast_object_list(box, group=place.group, group_src=place.source)
    there: dict[str, Any] = {}
    for key, what in box[0].items():
        if key in own:
            there[key] = staged(as_divided(own[key].detach()), place) if isinstance(own[key], Tensor) else own[key]
        elif len(what) == 2:
            like = torch.empty(what[0], dtype=what[1], device="meta")
            there[key] = staged(placeholder(like, parameter.device), place)
        else:
            (there[key],) = what
    return MappingProxyType(there)


def origin(tensor: Any) -> str | None:
    """The name of the parameter that it is, or was copied from; None for what was never staged."""
    place = vars(tensor).get(_STAGE)
    return None if place is None else place.name


def plain_again(parameters: Iterable[nn.Parameter]) -> list[Any]:
    """Gives parameters of this rank's stages the classes that they had; returns those that had ours."""
    found: list[Any] = [p for p in parameters if type(p) in _BEFORE]
    for parameter in found:
        parameter.__class__ = _BEFORE[type(parameter)]
    return found


def _staged_again(parameters: Iterable[Any]) -> list[Any]:
    found = [p for p in parameters if type(p) in _BEFORE.values() and _STAGE in vars(p)]
    for parameter in found:
        parameter.__class__ = _CLASSES[type(parameter)]
    return found


@contextmanager
def closed(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """While it lasts, these parameters are what they are without stages, and those of others tensors without memory."""
    found = plain_again(parameters)
    _closed.append(None)
    try:
        yield
    finally:
        _closed.pop()
        _staged_again(found)


@contextmanager
def opened(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside of :func:`closed`: staged tensors stand for the whole again."""
    before = _closed[:]
    _closed.clear()
    found = _staged_again(parameters)
    try:
        yield
    finally:
        plain_again(found)
        _closed[:] = before


def callable_parts(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of a module with parameters that have a forward: its children, or those of lists and dictionaries."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from callable_parts(child)
        elif any(True for _ in child.parameters()):
            yield child


def refuse_outside(module: nn.Module, args: Any) -> None:
    """A hook before the forward of a part of which ranks hold parts.

    Raises:
        RuntimeError: no step is running, in which the stages take turns.
    """
    if not _closed and (line := _line_of_user(sys._getframe(1))) is not None:
        raise RuntimeError(
            f"pp beside tp or dp_shard: {_where(line)} calls a {type(module).__name__} outside of a step, and each "
            "rank has parts of some of its layers only; call it in training_step, validation_step or predict_step, or "
            "use pp alone"
        )


# ------------------------------------------------------------------ ways


def _here(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs it on what this rank has: without memory, whole, or a part."""
    leaves = tree_leaves((args, kwargs))
    if any(map(is_placeholder, leaves)) and any(isinstance(leaf, (Here, HereParameter)) for leaf in leaves):
        # tensors without memory take torch's own classes only beside them
        args, kwargs = tree_map(
            lambda leaf: leaf.as_subclass(Tensor) if isinstance(leaf, (Here, HereParameter)) else leaf, (args, kwargs)
        )
    if any(isinstance(leaf, Divided) for leaf in leaves):
        return Divided.__torch_function__(func, (), args, kwargs)
    return func(*args, **kwargs)


def _alias(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    place = _place(_staged_in(args, kwargs)[0])
    try:
        return tree_map(lambda leaf: staged(leaf, place), _here(func, args, kwargs))
    except Exception:
        if not any(is_placeholder(leaf) for leaf in tree_leaves((args, kwargs))):
            raise
        return _on_whole(func, args, kwargs, line)  # an index whose size depends on values


def _view(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    """Where ranks have parts, a view is one of the whole, into which writes go where it is; the others get a copy."""
    first = args[0] if args else None
    if not isinstance(first, _Staged) or not _place(first).divided:
        return _alias(func, args, kwargs, line)
    place = _place(first)
    if is_placeholder(first):
        shapes: Any = func(*args, **kwargs)
        return tree_map(lambda leaf: _sent(leaf, place, name_of(func), line), shapes)
    with torch._C._EnableTorchFunction():
        views = _here(func, args, kwargs)
        tree_map(lambda leaf: _sent(leaf.detach(), place, name_of(func), line), views)
    return views


def _create(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    return _here(func, _with_memory(args), _with_memory(kwargs))


def _gradient(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    gradient = _here(func, args, kwargs)
    return gradient if gradient is None else staged(gradient, _place(args[0]))


def _set_gradient(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    target, value = args
    value = _for(target, value, "the gradient of a parameter of this stage is set to", line)
    if is_placeholder(target) and isinstance(value, Tensor) and not is_placeholder(value):
        value = placeholder(value)
    return _here(func, (target, value), {})


def _set_data(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    target, value = args
    value = _for(target, value, "assigned to `.data`, is", line)
    if not is_placeholder(target):
        with torch.no_grad():
            is_plain = isinstance(value, Tensor) and not isinstance(value, Divided)
            return _here(func, (target, value.as_subclass(Tensor) if is_plain else value), {})
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
    if isinstance(tensor, Divided):
        copied: Any = _here(func, args, kwargs)
    elif is_placeholder(tensor):
        copied = placeholder_parameter(tensor)
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
            drawn = _here(func, _with_memory(args), _with_memory(kwargs))  # and dropped
        return args[0] if writes(func) and args else staged(placeholder(drawn), place)
    return tree_map(lambda leaf: staged(leaf, place), _here(func, args, kwargs))


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
    return tree_map(lambda leaf: staged(leaf, _place(like)), _here(func, args, kwargs))


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
            part = _here(func, tuple(map(of_rows, args)), {name: of_rows(value) for name, value in kwargs.items()})
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
        return [
            _sent_number(_here(func, ([tensor], *args[1:]), kwargs)[0], tensor, func, line)
            if isinstance(tensor, _Staged)
            else func([tensor], *args[1:], **kwargs)[0]
            for tensor in first
        ]
    if not isinstance(first, _Staged):
        return func(*args, **kwargs) if not _staged_in(args, kwargs) else _on_whole(func, args, kwargs, line)
    result = _here(func, args, kwargs)
    if not isinstance(result, Tensor):
        return _on_whole(func, args, kwargs, line)
    return _sent_number(result, first, func, line)


def _sent_number(number: Tensor, of: Any, func: Any, line: FrameType) -> Tensor:
    return _sent(number.detach(), _place(of), name_of(func), line)


def _equal(func: Any, args: Any, kwargs: Any, line: FrameType) -> bool:
    """Lightning's ``BaseFinetuning`` asks it of all pairs of parameters; few of them are sent."""
    one, other = args
    if one is other or one.shape != other.shape:
        return one is other
    return bool(_on_whole(func, args, kwargs, line))


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
    if isinstance(first, Divided):
        write_part(first, wholes[id(first)])
    elif not is_placeholder(first):
        with torch.no_grad():
            first.detach().copy_(wholes[id(first)])  # type: ignore[attr-defined]
    return first if result is wholes[id(first)] else result


_WAYS: dict[Way, Callable[[Any, Any, Any, FrameType], Any]] = {
    Way.ALIAS: _alias,
    Way.VIEW: _view,
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


def _sent(tensor: Tensor, place: Place, what: str, line: FrameType) -> Tensor:
    """A tensor that the place's rank has. Communication: one broadcast over the pipeline.

    Raises:
        RuntimeError: it can't be sent, or not all ranks ask.
    """
    if place.group is None or not dist.is_initialized():
        raise RuntimeError(
            f"pp: {_where(line)}: {what} {place.name}, which the process of another stage held: this one knows its "
            "shape only, and the process group is gone; read it in a hook of the fit, or from a checkpoint"
        )
    meet(line, dist.get_process_group_ranks(place.group))
    is_source = dist.get_rank(place.group) == place.source
    if not is_source:
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    elif isinstance(tensor, DTensor):
        value = gathered(tensor).detach().contiguous()
    else:
        value = tensor.as_subclass(Tensor).contiguous().clone()
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
    """The innermost that is no library's; None where Lightning, this package or an optimizer asks. Lightning's
    callbacks read and write parameters as a user's do.
    """
    for _ in range(_DEEPEST):
        if frame is None:
            return None
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith(_ALLOWED) and not name.startswith("lightning_dist.divided."):
            return None
        if frame.f_code.co_varnames[:1] == ("self",) and isinstance(frame.f_locals.get("self"), torch.optim.Optimizer):
            return None
        if name.partition(".")[0] not in _LIBRARIES or name.startswith("lightning.pytorch.callbacks"):
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
    "lightning_dist",
    "lightning_fabric",
    "torchmetrics",
    "abc",
    "pickle",
}
