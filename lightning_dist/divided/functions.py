"""Which way a function of torch goes that is given a divided tensor: by its name, and the tags of its operator."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from functools import lru_cache
from types import MethodWrapperType
from typing import Any

import torch

from lightning_dist.compat.operators import FOREACH, FUSED, PRIVATE_QUESTIONS


class Way(Enum):
    """What is done; see the functions of ``tensor.py``."""

    ASK = auto()
    """What it says of the DTensor holds of the whole: shapes, dtypes, flags, hooks."""
    ALIAS = auto()
    """Its result is the same tensor, of the same layout."""
    ELEMENTWISE = auto()
    """Each element of the result depends on the same element of its arguments."""
    DRAW = auto()
    """It draws random numbers."""
    VIEW = auto()
    """Its result shares memory with its argument."""
    CREATE = auto()
    """A new tensor of another shape."""
    SUM = auto()
    NORM = auto()
    GRADIENT = auto()
    """Reads ``.grad``."""
    SET_DATA = auto()
    SET_GRADIENT = auto()
    GRADIENT_HOOK = auto()
    COPY = auto()
    """Deep copy."""
    WHOLE = auto()
    """Anything else: it is given the whole."""


_ALIAS = {"detach", "detach_", "requires_grad_", "alias", "contiguous", "data", "to", "type", "cpu", "cuda", "type_as"}
_ALIAS |= {"float", "double", "half", "bfloat16"}
_LIKE = {"zeros_like", "ones_like", "full_like", "empty_like", "clone", "copy_", "fill_", "zero_", f"{FOREACH}copy_"}
_LIKE |= {f"{FOREACH}zero_", "nan_to_num", "nan_to_num_", "isfinite", "isnan", "isinf"}
_ASK = {"size", "dim", "numel", "nelement", "stride", "element_size", "storage_offset", "is_contiguous", "ndimension"}
_ASK |= {"is_floating_point", "is_complex", "is_signed", "is_inference", "is_conj", "is_neg", "is_tensor", "is_pinned"}
_ASK |= {
    "result_type",
    "can_cast",
    "promote_types",
    "get_device",
    "has_names",
    "is_same_size",
    "is_shared",
    "is_set_to",
}
_ASK |= {
    "untyped_storage",
    "storage",
    "data_ptr",
    "retain_grad",
    "register_post_accumulate_grad_hook",
    "__hash__",
    "__dir__",
    "__len__",
    "__reduce_ex__",
}
_ASK |= {
    "__reduce__",
    "__setstate__",
    "is_distributed",
    "record_stream",
}
_ASK |= {"full_tensor", "to_local", "redistribute", "__tensor_flatten__", "is_coalesced", "share_memory_", "pin_memory"}
_ASK |= {
    "backward",
    "__repr__",
    "layout",
    "get_overridable_functions",
    "__get__",
}
_ASK |= PRIVATE_QUESTIONS
_VIEW = {"view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "t", "transpose", "permute"}
_VIEW |= {"unsqueeze", "squeeze", "narrow", "select", "__getitem__", "diagonal", "unbind", "split", "chunk", "expand"}
_VIEW |= {"expand_as", "swapaxes", "swapdims", "movedim", "moveaxis", "tensor_split", "unfold", "as_strided", "T", "mT"}
_VIEW |= {"H", "mH", "real", "imag", "view_as_real", "view_as_complex", "adjoint", "split_with_sizes", "diag_embed"}
_VIEW |= {"hsplit", "vsplit", "dsplit", "slice", "__iter__", "__reversed__", "swapaxes_", "detach_copy"}
_CREATE = {"new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new", "new_empty_strided"}
_REDUCE_TOO = {"max", "min", f"{FOREACH}max", f"{FOREACH}min"}
"""Element by element of two tensors, and reductions of one."""
_OPERATORS = {"truediv": "div", "rtruediv": "div", "radd": "add", "rmul": "mul", "floordiv": "floor_divide"}
_OPERATORS |= {"rfloordiv": "floor_divide", "rpow": "pow", "rdiv": "div", "rmod": "remainder", "mod": "remainder"}
_OPERATORS |= {
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "invert": "bitwise_not",
    "itruediv": "div_",
}
_OPERATORS |= {"ifloordiv": "floor_divide_", "imod": "remainder_", "iand": "bitwise_and_", "ior": "bitwise_or_"}
_OPERATORS |= {name: f"{name[1:]}_" for name in ("iadd", "isub", "imul", "ipow", "idiv")}
_GETTERS = {"grad": Way.GRADIENT, "data": Way.ALIAS}


def name_of(func: Callable[..., Any]) -> str:
    """Its name; of a property that is read, the property's."""
    if isinstance(func, MethodWrapperType):
        return func.__self__.__name__  # type: ignore[attr-defined]
    return getattr(func, "__name__", "")


@lru_cache(maxsize=4096)
def way_of(func: Callable[..., Any]) -> Way:
    """Which way a function goes."""
    name = name_of(func)
    if isinstance(func, MethodWrapperType):
        if func.__name__ == "__get__":
            return _GETTERS.get(name, Way.VIEW if name in _VIEW else Way.ASK)
        return {"data": Way.SET_DATA, "grad": Way.SET_GRADIENT}.get(name, Way.ASK)
    if getattr(func, "__module__", None) == "torch.nn.init":
        return Way.DRAW
    named = {
        "sum": Way.SUM,
        "norm": Way.NORM,
        "vector_norm": Way.NORM,
        "linalg_vector_norm": Way.NORM,
        f"{FOREACH}norm": Way.NORM,
        "__deepcopy__": Way.COPY,
    }
    if name in named:
        return named[name]
    for names, way in (
        (_ASK, Way.ASK),
        (_ALIAS, Way.ALIAS),
        (_LIKE, Way.ELEMENTWISE),
        (_VIEW, Way.VIEW),
        (_CREATE, Way.CREATE),
        ({"register_hook"}, Way.GRADIENT_HOOK),
    ):
        if name in names:
            return way
    tags = _tags(operator_name(name))
    if name in _REDUCE_TOO:
        return Way.WHOLE
    if torch.Tag.nondeterministic_seeded in tags:
        return Way.DRAW
    return Way.ELEMENTWISE if torch.Tag.pointwise in tags or name.startswith(FUSED) else Way.WHOLE


def operator_name(name: str) -> str:
    """That of the operator which works on one tensor."""
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        return _OPERATORS.get(name, name)
    return name.removeprefix(FOREACH)


def writes(func: Callable[..., Any]) -> bool:
    """Whether it changes its first argument."""
    name = name_of(func)
    if name == "__setitem__" or name.startswith(FUSED):
        return True
    operator = operator_name(name)
    return operator.endswith("_") and not operator.endswith("__")


def _tags(name: str) -> set[torch.Tag]:
    packet: Any = getattr(torch.ops.aten, name, None)
    if packet is None:
        return set()
    return {tag for overload in packet.overloads() for tag in getattr(packet, overload).tags}
