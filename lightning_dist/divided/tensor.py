"""A DTensor that answers as the whole tensor; see [Note: a divided tensor stands for the whole]."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor

from lightning_dist.compat.distributed import local_tensor
from lightning_dist.compat.operators import LIKE, TracingContext, divided_tensor, is_divided_alike, set_local_tensor
from lightning_dist.compat.torch import DisableTorchFunctionSubclass, EnableTorchFunction
from lightning_dist.divided.functions import Way, name_of, way_of, writes
from lightning_dist.divided.readers import agree_to_read, asked_by_user
from lightning_dist.divided.whole import norms_of, shared_draws, sum_of, view_of_whole, whole
from lightning_dist.dtensors import as_dtensor, from_first_data_rank, local_part, part_of
from lightning_dist.pytree import tree_leaves, tree_map

_MANY = 8  # aliases, some of which may be gone


class Divided(DTensor):
    """A DTensor that stands for the whole in code that does not know of ranks.

    - Element by element, in place or not, with tensors that are divided alike and with numbers: on this rank's part.
    - In place with a whole tensor: with this rank's part of it. So does ``.data = whole``.
    - A sum or a norm: a plain number of the whole. One all-reduce of a number.
    - Random numbers: those that the whole would be given, the first data rank's.
    - A view: a plain view of the whole; writes to it reach the part.
    - Anything else is computed from the whole, which is gathered, and gives plain tensors.

    All ranks that hold a part have to run such code alike. What a gradient flows back to is averaged over the data
    ranks, so that a penalty in a loss counts as in one process.

    An object becomes one by :func:`as_divided`, which changes its class: its memory, and who knows it, stay.
    """

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        way = _WAYS[way_of(func)]
        with DisableTorchFunctionSubclass():
            return way(func, args, kwargs or {})

    def full_tensor(self, *, grad_placements: Any = None) -> Tensor:
        """The whole, also of a packed weight, of which torch's own would be wrong (seen in 2.14)."""
        if grad_placements is not None:
            return super().full_tensor(grad_placements=grad_placements)
        return whole(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The user's code pickles the whole (``torch.save`` of weights or of a module); ours, parts."""
        if asked_by_user():
            value = whole(self).detach()
            if isinstance(self, nn.Parameter):
                value = nn.Parameter(value, requires_grad=self.requires_grad)
            return value.__reduce_ex__(protocol)
        return super().__reduce_ex__(protocol)

    def __tensor_flatten__(self) -> Any:
        if TracingContext.try_get() is not None:
            raise RuntimeError(
                f"torch.compile traces a function that reads a parameter {tuple(self.shape)} of which each rank holds "
                "a part; it can compile modules (module.compile(), or compile= of the strategy), not functions around "
                "them: leave this one as it is, or train under dp_replicate"
            )
        return super().__tensor_flatten__()


def as_divided(tensor: Any) -> Any:
    """A DTensor, made one that answers as the whole, in place; anything else as it is."""
    if type(tensor) is DTensor:
        tensor.__class__ = Divided
    return tensor


def divide(module: nn.Module) -> None:
    """Makes all DTensors among a module's parameters and buffers answer as the whole. Communication: none."""
    for tensor in (*module.parameters(), *module.buffers()):
        as_divided(tensor)


def _natively(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """As a DTensor does; the ways run while ``__torch_function__`` is off."""
    return func(*args, **kwargs)


def _alias(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    tensor: DTensor = args[0]
    if not isinstance(tensor, Divided):
        return _on_whole(func, args, kwargs)
    result = _natively(func, args, kwargs)
    if not isinstance(result, DTensor):
        return result
    if result.device != tensor.device:  # the ranks can't gather there
        return _on_whole(func, args, kwargs)
    result = as_divided(result)
    if name_of(func) in ("data", "detach"):  # remembers who shares its memory, which `.data = ` parts
        sharing: list[DTensor] = vars(tensor).setdefault("sharing_memory", [])
        if len(sharing) >= _MANY:
            sharing[:] = [sharing[index] for index in range(len(sharing)) if _is_alive(sharing, index)]
        sharing.append(result)
        vars(result)["sharing_memory"] = sharing
    return result


def _is_alive(sharing: list[DTensor], index: int) -> bool:
    """Whether others than the list hold it: a weak reference would forbid ``torch.utils.swap_tensors``."""
    return sys.getrefcount(sharing[index]) > 2


def _part_aliases(tensor: DTensor) -> None:
    """``p.data = x`` gives p other memory, not what was ``p.data`` before: here p keeps its own, they get a copy."""
    sharing: list[DTensor] = vars(tensor).pop("sharing_memory", [])
    before = None
    for index in range(len(sharing)):
        if _is_alive(sharing, index) and sharing[index] is not tensor:
            before = local_part(tensor).clone() if before is None else before
            set_local_tensor(sharing[index], before.view_as(before))
            vars(sharing[index]).pop("sharing_memory", None)
    sharing.clear()


def _gradient(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return as_divided(_natively(func, args, kwargs))


def _elementwise(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    changed = writes(func)
    first = args[0] if args else None
    if isinstance(first, (list, tuple)):
        return _each_elementwise(func, args, kwargs, changed)
    leaves = [*args, *kwargs.values()]
    if torch.is_grad_enabled() and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
        return _differentiably(func, args, kwargs, leaves)
    if changed and not isinstance(first, Divided):
        return _on_whole(func, args, kwargs)
    target = first if changed else None
    like = target if target is not None else next(leaf for leaf in leaves if isinstance(leaf, Divided))
    indices = name_of(func) == "where" and len(args) + len(kwargs) == 1
    if indices or "out" in kwargs or not all(_fits(leaf, like, target) for leaf in leaves):
        return _on_whole(func, args, kwargs)
    result = func(*(_local(leaf, like) for leaf in args), **{name: _local(v, like) for name, v in kwargs.items()})
    if target is not None:
        increment_version(target)
        return target
    if isinstance(result, Tensor):
        return _wrapped(result, like)
    return tree_map(lambda local: _wrapped(local, like), result)


def _fits(leaf: Any, like: DTensor, target: Any) -> bool:
    """Whether an argument can be used element by element beside a divided tensor."""
    if isinstance(leaf, DTensor):
        return is_divided_alike(leaf, like)
    if not isinstance(leaf, Tensor) or leaf.ndim == 0:
        return True
    if leaf.ndim > like.ndim:
        return False
    sizes = zip(reversed(leaf.shape), reversed(like.shape), strict=False)
    return leaf.numel() == 1 or (target is not None and all(own in (1, size) for own, size in sizes))


def _local(leaf: Any, like: DTensor) -> Any:
    if isinstance(leaf, DTensor):
        return local_tensor(leaf)
    if isinstance(leaf, Tensor) and leaf.ndim and leaf.numel() > 1:
        return part_of(leaf.expand(like.shape), like)
    return leaf


def _wrapped(local: Any, like: DTensor) -> Any:
    return divided_tensor(Divided, local, like) if isinstance(local, Tensor) else local


def _each_elementwise(func: Callable[..., Any], args: Any, kwargs: Any, changed: bool) -> Any:
    """For the ``foreach`` and ``fused`` functions, whose arguments are lists: each place of the lists on its own."""
    lists = [value for value in (*args, *kwargs.values()) if isinstance(value, (list, tuple))]
    lists = [values for values in lists if values and isinstance(values[0], Tensor)]
    if torch.is_grad_enabled() and any(v.requires_grad for values in lists for v in values):
        return _on_whole(func, args, kwargs)
    rows: list[DTensor | None] = []
    for row in zip(*(values for values in lists if len(values) == len(lists[0])), strict=True):
        like = row[0] if isinstance(row[0], Divided) else next((v for v in row if isinstance(v, Divided)), None)
        rows.append(like)
        if like is None:
            continue
        target = row[0] if changed else None
        if target is not None and target is not like:
            return _on_whole(func, args, kwargs)
        if not all(value is like or _fits(value, like, target) for value in row):
            return _on_whole(func, args, kwargs)

    def parts(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and len(value) == len(rows):
            return [v if like is None else _local(v, like) for v, like in zip(value, rows, strict=True)]
        return local_tensor(value) if isinstance(value, DTensor) else value

    result = func(*(parts(value) for value in args), **{name: parts(value) for name, value in kwargs.items()})
    if changed:
        increment_version([value for value in lists[0] if isinstance(value, Divided)])
        return args[0] if result is not None else None
    if not isinstance(result, (list, tuple)) or len(result) != len(rows):
        return result
    return [v if like is None else _wrapped(v, like) for v, like in zip(result, rows, strict=True)]


def _differentiably(func: Callable[..., Any], args: Any, kwargs: Any, leaves: list[Any]) -> Any:
    """By DTensor's own operators, which know their gradients."""
    like = next(leaf for leaf in leaves if isinstance(leaf, DTensor))
    simple = all(_fits(leaf, like, None) for leaf in leaves) and not isinstance(args[0], (list, tuple))
    if not simple and not (writes(func) and isinstance(args[0], Divided)):
        return _on_whole(func, args, kwargs)
    return tree_map(as_divided, func(*args, **kwargs))


def _sum(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if len(args) == 1 and isinstance(args[0], Divided) and not set(kwargs) - {"dtype"}:
        return sum_of(args[0], kwargs.get("dtype"))
    return _on_whole(func, args, kwargs)


def _norm(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    names = ("self", "p" if name_of(func) == "norm" else "ord")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    given = {name: value for name, value in given.items() if not (value is None or value is False)}
    tensors = next(given.pop(name) for name in ("self", "input", "x") if name in given)
    p = given.pop("p", given.pop("ord", 2))
    p = {"fro": 2, "inf": float("inf")}.get(p, p) if isinstance(p, str) else p
    each = list(tensors) if isinstance(tensors, (list, tuple)) else [tensors]
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in each)
    if len(args) > 2 or given or differentiable or not isinstance(p, (int, float)) or not p > 0:
        return _on_whole(func, args, kwargs)
    norms = norms_of(each, float(p))
    return norms if isinstance(tensors, (list, tuple)) else norms[0]


def _on_whole(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Runs it on the whole of what is divided; what it changes in place is then divided again."""
    wholes: dict[int, Tensor] = {}
    changed = _changed(func, args, kwargs)

    def gathered(leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        if id(leaf) not in wholes:
            wholes[id(leaf)] = whole(leaf)
        return wholes[id(leaf)]

    if changed:
        _refuse_leaf_in_place(changed)
    whole_args, whole_kwargs = tree_map(gathered, (list(args), dict(kwargs)))
    with EnableTorchFunction():  # for views of other wholes
        result = func(*whole_args, **whole_kwargs)
    if not changed:
        if isinstance(result, np.ndarray):
            result.flags.writeable = False  # of a copy: a write would be lost
        return result
    for target in changed:
        write_part(target, wholes[id(target)])
    back = {id(wholes[id(target)]): target for target in changed}
    return tree_map(lambda leaf: back.get(id(leaf), leaf), result)


def _changed(func: Callable[..., Any], args: Any, kwargs: Any) -> list[DTensor]:
    targets = [leaf for leaf in tree_leaves(kwargs.get("out")) if isinstance(leaf, DTensor)]
    if writes(func):
        first = args[0] if args else next((kwargs[n] for n in ("self", "input", "tensor") if n in kwargs), None)
        targets += [leaf for leaf in tree_leaves(first) if isinstance(leaf, DTensor)]
    return targets


def _refuse_leaf_in_place(targets: list[DTensor]) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad and t.is_leaf for t in targets):
        raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")  # as torch


def write_part(target: DTensor, values: Tensor) -> None:
    """Copies this rank's part of whole values to a divided tensor."""
    with torch.no_grad():
        local_part(target).copy_(part_of(values, target))
        increment_version(target)


def _view(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    tensor = args[0] if args else None
    if not isinstance(tensor, Divided) or (torch.is_grad_enabled() and tensor.requires_grad):
        return _on_whole(func, args, kwargs)
    return view_of_whole(tensor, func, args[1:], kwargs)


def _create(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    tensor: DTensor = args[0]
    return shared_draws(func(local_tensor(tensor), *args[1:], **kwargs), tensor)


def _draw(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The numbers that the whole would be given, by every rank, of which the first data rank's are taken."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    like = next(leaf for leaf in leaves if isinstance(leaf, Divided))
    agree_to_read(like)
    fills = writes(func)
    if len(leaves) > 1 or not (fills or name_of(func).endswith(LIKE)):
        return _on_whole(func, args, kwargs)
    if fills:
        _refuse_leaf_in_place([] if getattr(func, "__module__", "") == "torch.nn.init" else [like])
    filled = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    args, kwargs = tree_map(lambda leaf: filled if leaf is like else leaf, (list(args), dict(kwargs)))
    result = func(*args, **kwargs)
    if not fills:
        return _wrapped(part_of(from_first_data_rank(result, like), like), like)
    write_part(like, from_first_data_rank(filled, like))
    return like


def _set_data(func: Callable[..., Any], args: Any, kwargs: Any) -> None:
    target, value = args
    if not isinstance(target, Divided):  # a plain tensor that is given a divided one's memory
        func(target, whole(value).clone(), **kwargs)
        return
    if not isinstance(value, Tensor) or value.shape != target.shape or value.dtype != target.dtype:
        given = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(
            f"`.data` of a parameter {tuple(target.shape)} {target.dtype}, of which each rank holds a part, was "
            f"assigned {given}: its shape and dtype stay those that it was "
            "divided with; change them before the fit, in __init__ or configure_model"
        )
    if isinstance(value, DTensor) and not is_divided_alike(value, target):
        value = whole(value)
    with torch.no_grad():
        source = local_tensor(value) if isinstance(value, DTensor) else part_of(value, target)
        if source.untyped_storage().data_ptr() == local_tensor(target).untyped_storage().data_ptr():
            return  # what it was
        _part_aliases(target)
        local_part(target).copy_(source)


def _set_gradient(func: Callable[..., Any], args: Any, kwargs: Any) -> None:
    target, value = args
    if isinstance(target, Divided) and isinstance(value, Tensor) and not isinstance(value, DTensor):
        value = _wrapped(part_of(value, target), target)
    elif isinstance(value, DTensor) and not isinstance(target, DTensor):
        value = whole(value)
    return _natively(func, (target, value), kwargs)


def _gradient_hook(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    tensor, hook = args
    if tensor.is_leaf and set(tensor.device_mesh.mesh_dim_names or ()) - {"tp"}:
        raise RuntimeError(
            "register_hook on a parameter that dp_shard divides: its gradient is reduced with others of its block, and "
            "the hook would not be called; use register_post_accumulate_grad_hook, on_after_backward or "
            "on_before_optimizer_step"
        )
    return func(tensor, lambda value: hook(as_divided(value)), **kwargs)


def _deep_copy(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    tensor, memo = args[0], args[1] if len(args) > 1 else kwargs.get("memo", {})
    if id(tensor) in memo:
        return memo[id(tensor)]
    if not tensor.is_leaf:
        raise RuntimeError("Only Tensors created explicitly by the user (graph leaves) support the deepcopy protocol")
    copied: Any = as_dtensor(local_part(tensor).clone(), tensor).requires_grad_(tensor.requires_grad)
    if isinstance(tensor, nn.Parameter):
        copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
    vars(copied).update(vars(tensor))
    memo[id(tensor)] = as_divided(copied)
    return copied


_WAYS: dict[Way, Callable[[Callable[..., Any], Any, Any], Any]] = {
    Way.ASK: _natively,
    Way.ALIAS: _alias,
    Way.ELEMENTWISE: _elementwise,
    Way.DRAW: _draw,
    Way.VIEW: _view,
    Way.CREATE: _create,
    Way.SUM: _sum,
    Way.NORM: _norm,
    Way.GRADIENT: _gradient,
    Way.SET_DATA: _set_data,
    Way.SET_GRADIENT: _set_gradient,
    Way.GRADIENT_HOOK: _gradient_hook,
    Way.COPY: _deep_copy,
    Way.WHOLE: _on_whole,
}
