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

    ASK = auto()  # what it says of the DTensor holds of the whole: shapes, dtypes, flags, hooks
    ALIAS = auto()  # its result is the same tensor, of the same layout
    ELEMENTWISE = auto()  # each element of the result depends on the same element of its arguments
    DRAW = auto()  # it draws random numbers
    VIEW = auto()  # its result shares memory with its argument
    CREATE = auto()  # a new tensor of another shape
    SUM = auto()
    NORM = auto()
    GRADIENT = auto()  # reads ``.grad``
    SET_DATA = auto()
    SET_GRADIENT = auto()
    GRADIENT_HOOK = auto()
    COPY = auto()  # deep copy
    WHOLE = auto()  # anything else: it is given the whole


_NAMES: dict[Way, set[str]] = {
    Way.ASK: {
        "size", "dim", "numel", "nelement", "stride", "element_size", "storage_offset", "is_contiguous", "ndimension",
        "is_floating_point", "is_complex", "is_signed", "is_inference", "is_conj", "is_neg", "is_tensor", "is_pinned",
        "result_type", "can_cast", "promote_types", "get_device", "has_names", "is_same_size", "is_shared", "is_set_to",
        "untyped_storage", "storage", "data_ptr", "retain_grad", "register_post_accumulate_grad_hook", "__hash__",
        "__dir__", "__len__", "__reduce_ex__", "__reduce__", "__setstate__", "is_distributed", "record_stream",
        "full_tensor", "to_local", "redistribute", "__tensor_flatten__", "is_coalesced", "share_memory_", "pin_memory",
        "backward", "__repr__", "layout", "get_overridable_functions", "__get__", *PRIVATE_QUESTIONS,
    },
    Way.ALIAS: {
        "detach", "detach_", "requires_grad_", "alias", "contiguous", "data", "to", "type", "cpu", "cuda", "type_as",
        "float", "double", "half", "bfloat16",
    },
    Way.ELEMENTWISE: {
        "zeros_like", "ones_like", "full_like", "empty_like", "clone", "copy_", "fill_", "zero_", f"{FOREACH}copy_",
        f"{FOREACH}zero_", "nan_to_num", "nan_to_num_", "isfinite", "isnan", "isinf",
    },
    Way.VIEW: {
        "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "t", "transpose", "permute",
        "unsqueeze", "squeeze", "narrow", "select", "__getitem__", "diagonal", "unbind", "split", "chunk", "expand",
        "expand_as", "swapaxes", "swapdims", "movedim", "moveaxis", "tensor_split", "unfold", "as_strided", "T", "mT",
        "H", "mH", "real", "imag", "view_as_real", "view_as_complex", "adjoint", "split_with_sizes", "diag_embed",
        "hsplit", "vsplit", "dsplit", "slice", "__iter__", "__reversed__", "swapaxes_", "detach_copy",
    },
    Way.CREATE: {"new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new", "new_empty_strided"},
    Way.SUM: {"sum"},
    Way.NORM: {"norm", "vector_norm", "linalg_vector_norm", f"{FOREACH}norm"},
    Way.GRADIENT_HOOK: {"register_hook"},
    Way.COPY: {"__deepcopy__"},
    Way.WHOLE: {"max", "min", f"{FOREACH}max", f"{FOREACH}min"},  # reductions, though of two tensors element by element
}  # fmt: skip
"""By name; others go by the tags of their operators."""
_WAY_OF_NAME = {name: way for way, names in _NAMES.items() for name in names}
_OPERATORS = {
    "truediv": "div", "rtruediv": "div", "rdiv": "div", "itruediv": "div_", "idiv": "div_", "floordiv": "floor_divide",
    "rfloordiv": "floor_divide", "ifloordiv": "floor_divide_", "mod": "remainder", "rmod": "remainder",
    "imod": "remainder_", "radd": "add", "iadd": "add_", "isub": "sub_", "rmul": "mul", "imul": "mul_", "rpow": "pow",
    "ipow": "pow_", "and": "bitwise_and", "iand": "bitwise_and_", "or": "bitwise_or", "ior": "bitwise_or_",
    "xor": "bitwise_xor", "invert": "bitwise_not",
}  # fmt: skip


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
            known = {"grad": Way.GRADIENT, "data": Way.ALIAS}.get(name)
            return known or (Way.VIEW if name in _NAMES[Way.VIEW] else Way.ASK)
        return {"data": Way.SET_DATA, "grad": Way.SET_GRADIENT}.get(name, Way.ASK)
    if getattr(func, "__module__", None) == "torch.nn.init":
        return Way.DRAW
    if name in _WAY_OF_NAME:
        return _WAY_OF_NAME[name]
    tags = _tags(operator_name(name))
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
    overloads = () if packet is None else packet.overloads()
    return {tag for overload in overloads for tag in getattr(packet, overload).tags}
