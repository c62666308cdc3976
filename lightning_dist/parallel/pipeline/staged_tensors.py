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

from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dist.compat.torch import DisableTorchFunctionSubclass, EnableTorchFunction, FakeTensor
from lightning_dist.divided.functions import Way, name_of, way_of, writes
from lightning_dist.divided.tensor import Divided, write_part
from lightning_dist.parallel.pipeline.stage_owner import (
    Staged,
    are_plain,
    beside,
    line_of_user,
    origin,
    owner_of,
    sent,
    staged,
    stand_for,
    where,
    whole_of,
)
from lightning_dist.patches import Patches
from lightning_dist.placeholder import is_placeholder, placeholder, placeholder_parameter
from lightning_dist.pytree import tree_leaves, tree_map


def on_this_rank(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs it on what this rank has: without memory, whole, or a part."""
    is_asked_alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)  # as often, for its attributes
    leaves = args if is_asked_alone else tree_leaves((args, kwargs))
    if any(map(is_placeholder, leaves)) and any(_is_whole_here(leaf) for leaf in leaves):
        # tensors without memory take torch's own classes only beside them
        args, kwargs = tree_map(lambda leaf: leaf.as_subclass(Tensor) if _is_whole_here(leaf) else leaf, (args, kwargs))
    if any(isinstance(leaf, Divided) for leaf in leaves):
        return Divided.__torch_function__(func, (), args, kwargs)
    return func(*args, **kwargs)


def _alias(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    owner = owner_of(_staged_in(args, kwargs)[0])
    try:
        return tree_map(lambda leaf: staged(leaf, owner), on_this_rank(func, args, kwargs))
    except Exception:
        if not any(is_placeholder(leaf) for leaf in tree_leaves((args, kwargs))):
            raise
        return _on_whole(func, args, kwargs, line)  # an index whose size depends on values


def _view(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    """Where ranks have parts, a view is one of the whole, into which writes go where it is; the others get a copy."""
    first = args[0] if args else None
    if not isinstance(first, Staged) or not owner_of(first).divided:
        return _alias(func, args, kwargs, line)
    owner = owner_of(first)
    if is_placeholder(first):
        shapes: Any = func(*args, **kwargs)
        return tree_map(lambda leaf: sent(leaf, owner, name_of(func), line), shapes)
    with EnableTorchFunction():
        views = on_this_rank(func, args, kwargs)
        tree_map(lambda leaf: sent(leaf.detach(), owner, name_of(func), line), views)
    return views


def _create(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    return on_this_rank(func, _with_memory(args), _with_memory(kwargs))


def _gradient(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    return staged(on_this_rank(func, args, kwargs), owner_of(args[0]))


def _set_gradient(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    target, value = args
    value = beside(target, value, "the gradient of a parameter of this stage is set to", line)
    if is_placeholder(target) and isinstance(value, Tensor) and not is_placeholder(value):
        value = placeholder(value)
    return on_this_rank(func, (target, value), {})


def _set_data(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    target, value = args
    value = beside(target, value, "assigned to `.data`, is", line)
    if is_placeholder(target):
        return None
    if isinstance(value, Tensor) and not isinstance(value, Divided):
        value = value.as_subclass(Tensor)
    with torch.no_grad():
        return on_this_rank(func, (target, value), {})


def _gradient_hook(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    raise RuntimeError(
        f"pp: {where(line)}: a hook on the gradient of {owner_of(args[0]).name} would see that of each microbatch; use "
        "on_after_backward or on_before_optimizer_step"
    )


def _copy(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    tensor, memo = args[0], args[1] if len(args) > 1 else kwargs.get("memo", {})
    if id(tensor) in memo:
        return memo[id(tensor)]
    if isinstance(tensor, Divided):
        copied: Any = on_this_rank(func, args, kwargs)
    elif is_placeholder(tensor):
        copied = placeholder_parameter(tensor)
    else:
        values = tensor.detach().clone()
        copied = nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
        vars(copied).update(vars(tensor))
    memo[id(tensor)] = staged(copied, owner_of(tensor))
    return copied


def _draw(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    tensors = _staged_in(args, kwargs)
    owner = owner_of(tensors[0])
    if any(is_placeholder(tensor) for tensor in tensors):
        with torch.no_grad():
            drawn = on_this_rank(func, _with_memory(args), _with_memory(kwargs))  # and dropped
        return args[0] if writes(func) and args else staged(placeholder(drawn), owner)
    return tree_map(lambda leaf: staged(leaf, owner), on_this_rank(func, args, kwargs))


def _elementwise(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    first = args[0] if args else None
    if isinstance(first, (list, tuple)):
        return _row_by_row(func, args, kwargs, line)
    changes = writes(func)
    if (changes and not isinstance(first, Staged)) or "out" in kwargs:
        return _on_whole(func, args, kwargs, line)
    like = first if changes else _staged_in(args, kwargs)[0]
    what = f"meets, in {name_of(func)},"
    args, kwargs = tree_map(lambda leaf: beside(like, leaf, what, line), (tuple(args), dict(kwargs)))
    return tree_map(lambda leaf: staged(leaf, owner_of(like)), on_this_rank(func, args, kwargs))


def _row_by_row(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    """``foreach`` functions: of each stage's rows together."""
    length = len(args[0])
    lists = [v for v in (*args, *kwargs.values()) if isinstance(v, (list, tuple)) and len(v) == length]
    lists = [values for values in lists if isinstance(values[0], Tensor)]
    what = f"meets, in {name_of(func)},"
    rows: list[list[Any]] = []
    for row in zip(*lists, strict=True):
        if writes(func) and not isinstance(row[0], Staged):
            rows.append([whole_of(leaf, what, line) for leaf in row])
        else:
            like = next((leaf for leaf in row if isinstance(leaf, Staged)), row[0])
            rows.append([beside(like, leaf, what, line) for leaf in row])
    columns = {id(values): [row[place] for row in rows] for place, values in enumerate(lists)}
    results: dict[int, Any] = {}
    for there in (False, True):
        indices = [index for index, row in enumerate(rows) if is_placeholder(row[0]) is there]

        def of_rows(value: Any, indices: list[int] = indices) -> Any:
            is_row = isinstance(value, (list, tuple)) and len(value) == length
            return [columns.get(id(value), value)[index] for index in indices] if is_row else value

        if indices:
            part = on_this_rank(func, tuple(map(of_rows, args)), {key: of_rows(v) for key, v in kwargs.items()})
            if isinstance(part, (list, tuple)):
                results.update(zip(indices, part, strict=True))
    if writes(func) or not results:
        return args[0] if results else None
    places = [next((owner_of(leaf) for leaf in row if isinstance(leaf, Staged)), None) for row in rows]
    return [results[i] if owner is None else staged(results[i], owner) for i, owner in enumerate(places)]


def _number(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    """A sum or a norm: computed where the tensor is, and sent."""
    first = args[0] if args else None
    if isinstance(first, (list, tuple)):
        one_by_one = ([tensor] for tensor in first)
        return [
            sent(on_this_rank(func, (one, *args[1:]), kwargs)[0].detach(), owner_of(one[0]), name_of(func), line)
            if isinstance(one[0], Staged)
            else func(one, *args[1:], **kwargs)[0]
            for one in one_by_one
        ]
    if not _staged_in(args, kwargs):
        return func(*args, **kwargs)
    result = on_this_rank(func, args, kwargs) if isinstance(first, Staged) else None
    if not isinstance(result, Tensor):
        return _on_whole(func, args, kwargs, line)
    return sent(result.detach(), owner_of(first), name_of(func), line)


def _equal(func: Any, args: Any, kwargs: Any, line: FrameType) -> bool:
    """Lightning's ``BaseFinetuning`` asks it of all pairs of parameters; few of them are sent."""
    one, other = args
    if one is other or one.shape != other.shape:
        return one is other
    return bool(_on_whole(func, args, kwargs, line))


def _on_whole(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    """Anything else: on tensors that every rank is given; what it changes in place is written back where it is."""
    wholes: dict[int, Tensor] = {}

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, Staged):
            return leaf
        if id(leaf) not in wholes:
            wholes[id(leaf)] = whole_of(leaf, name_of(func) or str(func), line)
        return wholes[id(leaf)]

    whole_args, whole_kwargs = tree_map(whole, (list(args), dict(kwargs)))
    result = func(*whole_args, **whole_kwargs)
    first = args[0] if args else None
    if not writes(func) or not isinstance(first, Staged):
        return result
    if isinstance(first, Divided):
        write_part(first, wholes[id(first)])
    elif not is_placeholder(first):
        with torch.no_grad():
            first.detach().copy_(wholes[id(first)])  # type: ignore[attr-defined]
    return first if result is wholes[id(first)] else result


def _with_memory(value: Any) -> Any:
    def real(leaf: Any) -> Any:
        return torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device) if is_placeholder(leaf) else leaf

    return tree_map(real, value if isinstance(value, dict) else tuple(value))


def _staged_in(args: Any, kwargs: Any) -> list[Any]:
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Staged)]


def _is_whole_here(leaf: Any) -> bool:
    """Whether it is a tensor of this rank's stages of which it has all."""
    return isinstance(leaf, Staged) and not isinstance(leaf, Divided) and not is_placeholder(leaf)


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


class _InUsersHands(Staged):
    """Runs torch functions by what they do. The user's code pickles the whole (``torch.save`` of weights, on all ranks
    alike); ours, what is here.
    """

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        way = way_of(func)
        with DisableTorchFunctionSubclass():
            if way is Way.ASK or are_plain() or (line := line_of_user()) is None:
                return on_this_rank(func, args, kwargs)
            run = _equal if name_of(func) == "equal" else _WAYS.get(way, _on_whole)
            return run(func, args, kwargs, line)

    def __reduce_ex__(self, protocol: Any) -> Any:
        tensor: Any = self
        line = None if are_plain() else line_of_user()
        can_send = dist.is_initialized() and owner_of(self).group is not None
        if line is not None and (can_send or isinstance(self, RemoteTensor)):
            with DisableTorchFunctionSubclass():
                whole = whole_of(tensor, "pickle", line)
                if isinstance(tensor, nn.Parameter):
                    whole = nn.Parameter(whole, requires_grad=tensor.requires_grad)
                return whole.__reduce_ex__(protocol)
        if isinstance(tensor, (OwnTensor, OwnParameter)):
            plain = nn.Parameter if isinstance(tensor, OwnParameter) else Tensor
            with DisableTorchFunctionSubclass():
                return tensor.as_subclass(plain).__reduce_ex__(protocol)
        return super().__reduce_ex__(protocol)


class RemoteTensor(_InUsersHands, FakeTensor):
    """A parameter of another stage, or what is computed of it; see [Note: what a stage holds]."""


class OwnParameter(_InUsersHands, nn.Parameter):
    """A parameter of this rank's stages."""


class OwnTensor(_InUsersHands, Tensor):
    """A gradient of one, or what is computed of it."""


class OwnDivided(_InUsersHands, Divided):
    """A parameter of this rank's stages of which it holds a part, its gradient, or what is computed of them."""


stand_for({FakeTensor: RemoteTensor, nn.Parameter: OwnParameter, Tensor: OwnTensor, Divided: OwnDivided})


def refuse_calls_outside(module: nn.Module, patches: Patches) -> None:
    """Refuses calls of the parts of a module outside of a step, in which the stages take turns."""
    for child in _callable_parts(module):
        if not any(map(origin, child.parameters())):  # else since an earlier run
            patches.also(child.register_forward_pre_hook(_refuse_outside, prepend=True).remove)


def _callable_parts(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of a module with parameters that have a forward: its children, or those of lists and dictionaries."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _callable_parts(child)
        elif any(True for _ in child.parameters()):
            yield child


def _refuse_outside(module: nn.Module, args: Any) -> None:
    if not are_plain() and (line := line_of_user()) is not None:
        raise RuntimeError(
            f"pp beside tp or dp_shard: {where(line)} calls a {type(module).__name__} outside of a step, and each "
            "rank has parts of some of its layers only; call it in training_step, validation_step or predict_step, or "
            "use pp alone"
        )
