"""What a torch function does with staged tensors, by the kind of function; see [Note: what a stage holds]."""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dist.compat.torch import EnableTorchFunction
from lightning_dist.divided.functions import Way, name_of, writes
from lightning_dist.divided.tensor import Divided, write_part
from lightning_dist.parallel.pipeline.stage_owner import Staged, owner_of, staged
from lightning_dist.parallel.pipeline.stage_sends import beside, sent, whole_of
from lightning_dist.parallel.pipeline.user_frames import where
from lightning_dist.placeholder import is_placeholder, placeholder, placeholder_parameter
from lightning_dist.pytree import tree_leaves, tree_map


def on_this_rank(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs it on what this rank has: without memory, whole, or a part."""
    leaves = tree_leaves((args, kwargs))
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
    gradient = on_this_rank(func, args, kwargs)
    return gradient if gradient is None else staged(gradient, owner_of(args[0]))


def _set_gradient(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    target, value = args
    value = beside(target, value, "the gradient of a parameter of this stage is set to", line)
    if is_placeholder(target) and isinstance(value, Tensor) and not is_placeholder(value):
        value = placeholder(value)
    return on_this_rank(func, (target, value), {})


def _set_data(func: Any, args: Any, kwargs: Any, line: FrameType) -> Any:
    target, value = args
    value = beside(target, value, "assigned to `.data`, is", line)
    if not is_placeholder(target):
        with torch.no_grad():
            is_plain = isinstance(value, Tensor) and not isinstance(value, Divided)
            return on_this_rank(func, (target, value.as_subclass(Tensor) if is_plain else value), {})
    return None


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
            rows.append([beside(like, leaf, what, line) if isinstance(like, Staged) else leaf for leaf in row])
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
            part = on_this_rank(
                func, tuple(map(of_rows, args)), {name: of_rows(value) for name, value in kwargs.items()}
            )
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
        return [
            _sent_number(on_this_rank(func, ([tensor], *args[1:]), kwargs)[0], tensor, func, line)
            if isinstance(tensor, Staged)
            else func([tensor], *args[1:], **kwargs)[0]
            for tensor in first
        ]
    if not isinstance(first, Staged):
        return func(*args, **kwargs) if not _staged_in(args, kwargs) else _on_whole(func, args, kwargs, line)
    result = on_this_rank(func, args, kwargs)
    if not isinstance(result, Tensor):
        return _on_whole(func, args, kwargs, line)
    return _sent_number(result, first, func, line)


def _sent_number(number: Tensor, of: Any, func: Any, line: FrameType) -> Tensor:
    return sent(number.detach(), owner_of(of), name_of(func), line)


def equal(func: Any, args: Any, kwargs: Any, line: FrameType) -> bool:
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
        if not isinstance(leaf, Staged):
            return leaf
        if id(leaf) not in wholes:
            wholes[id(leaf)] = whole_of(leaf, what, line)
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


def function_of_way(way: Way) -> Callable[[Any, Any, Any, FrameType], Any]:
    """What runs functions of a kind."""
    return _WAYS.get(way, _on_whole)
