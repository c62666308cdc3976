"""Logits of which each rank holds some columns, and that code may use as any tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lightning_dist.compat.operators import writes_in_place
from lightning_dist.compat.torch import DisableTorchFunctionSubclass, tensor_attributes
from lightning_dist.parallel.tensor.vocab_parallel.operators import OPERATORS
from lightning_dist.parallel.tensor.vocab_parallel.sharding_rules import (
    BY_ANY_ARGUMENT,
    BY_FIRST_ARGUMENT,
    IN_PLACE,
    torch_functions,
)
from lightning_dist.parallel.tensor.vocab_parallel.split_tensor import VocabTensor
from lightning_dist.parallel.tensor.vocab_parallel.vocabulary import Vocabulary
from lightning_dist.pytree import tree_leaves, tree_map_only


class VocabLogits(VocabTensor):
    """A tensor of global shape (..., V, ...) whose vocabulary dim is split over the ranks of a 1-D mesh.

    Made by :meth:`from_local`, differentiable with respect to the local columns. What it costs, over the mesh:

    - views, slices and moves of other dims, changes of dtype, and arithmetic number by number stay split: nothing;
    - ``cross_entropy``: see :func:`vocab_cross_entropy`; the whole logits are never made;
    - ``argmax``, ``max`` and ``topk`` over the vocabulary: one small all-gather;
    - anything else: one all-gather of the whole logits, which are kept and serve again; the result is a plain tensor.
      Backward each rank takes the gradient of its columns and sends nothing: what follows the logits has to run alike
      on every rank of the mesh.

    So every rank of the mesh has to ask for the same; asking on one rank only hangs. ``repr`` sends nothing.
    Writing in place writes this rank's columns. It can't be pickled: pickle :meth:`full_tensor`.
    """

    @staticmethod
    def from_local(columns: Tensor, mesh: DeviceMesh, vocab_size: int) -> VocabLogits:
        """Logits (..., vocab_size) from this rank's columns (..., own width), by torch's chunk rule over a 1-D mesh.

        Raises:
            ValueError: another number of columns than the rule gives this rank, or a mesh of more axes.
        """
        vocabulary = Vocabulary(mesh, vocab_size)
        if columns.shape[-1] != vocabulary.width:
            shape = tuple(columns.shape)
            raise ValueError(
                f"this rank holds {vocabulary.width} of {vocab_size} columns; the tensor's shape is {shape}"
            )
        return VocabLogits.from_columns(columns, vocabulary, columns.ndim - 1)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        start, width = self.vocabulary.start, self.vocabulary.width
        grad = f", grad_fn=<{self.grad_fn.name()}>" if self.grad_fn is not None else ""
        return (
            f"VocabLogits(shape={tuple(self.shape)}, columns {start}:{start + width} of dim {self.vocab_dim} here, "
            f"dtype={self.dtype}, device={str(self.device)!r}{grad})"
        )

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(
            "logits split by vocabulary can't be pickled: a rank holds its columns only. Pickle logits.full_tensor(), "
            "called on every rank of the tensor-parallel mesh."
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with DisableTorchFunctionSubclass():
            if func in _AS_IT_IS:
                return func(*args, **kwargs)
            if func in _REFUSED:
                raise RuntimeError(f"logits split by vocabulary can't: {_REFUSED[func]}. Take logits.full_tensor().")
            logits = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, VocabLogits))
            result = _without_gather(func, logits, args, kwargs)
            return _with_gather(func, args, kwargs) if result is NotImplemented else result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """What reaches torch's kernels past ``__torch_function__``: autograd's engine, mostly."""
        kwargs = kwargs or {}
        aten = torch.ops.aten
        logits = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, VocabLogits))
        same_shape = func is aten.view.default and tuple(args[1]) == tuple(logits.shape)
        if func in (aten.detach.default, aten.alias.default) or same_shape:
            return logits.detached()
        if writes_in_place(func):
            raise RuntimeError(f"logits split by vocabulary can't be written by {func}: take logits.full_tensor()")
        with torch.no_grad():
            result = _without_gather(torch.add, logits, args, kwargs) if func is aten.add.Tensor else NotImplemented
            return _with_gather(func, args, kwargs) if result is NotImplemented else result


def _without_gather(func: Any, logits: VocabLogits, args: Any, kwargs: Any) -> Any:
    """The result from this rank's columns and small messages, or NotImplemented."""
    try:
        if func in OPERATORS:
            return OPERATORS[func](*args, **kwargs)
        if func in _SHAPE_ONLY:
            shaped = logits.local_values().new_empty(1).expand(logits.shape)
            return func(*tree_map_only(VocabLogits, lambda _: shaped, args), **kwargs)
        rule = None
        if func in BY_ANY_ARGUMENT:
            rule = BY_ANY_ARGUMENT[func](logits, *args, **kwargs)
        elif func in BY_FIRST_ARGUMENT and args[0] is logits:
            rule = BY_FIRST_ARGUMENT[func](*args, **kwargs)
    except (TypeError, IndexError, ValueError):
        rule = None  # the call on a plain tensor says what is wrong with it
    if rule is None:
        return NotImplemented
    function, dim = rule
    columns = logits.to_local()
    result = function(columns)
    if result is columns:
        if func in IN_PLACE:
            logits.count_write()
        return logits
    if isinstance(result, Tensor):
        return logits.derive(result, dim, lambda full: _plain(func, logits, full, args, kwargs))
    parts = [
        logits.derive(part, dim, lambda full, i=i: list(_plain(func, logits, full, args, kwargs))[i])  # type: ignore[misc]
        for i, part in enumerate(result)
    ]
    return tuple(parts) if isinstance(result, tuple | list) else iter(parts)


def _plain(func: Any, logits: VocabLogits, full: Tensor, args: Any, kwargs: Any) -> Any:
    return func(*[full if value is logits else value for value in args], **kwargs)


def _with_gather(func: Any, args: Any, kwargs: Any) -> Any:
    """The result from the whole logits."""
    args_, kwargs_ = tree_map_only(VocabLogits, VocabLogits.full_tensor, (args, kwargs))
    result = func(*args_, **kwargs_)
    for logits in tree_leaves((args, kwargs)):
        if isinstance(logits, VocabLogits):
            logits.write_back()
    return result


_METADATA = """
    size dim ndimension numel nelement element_size stride is_floating_point is_complex is_contiguous is_signed
    get_device is_inference is_same_size __len__ __hash__ backward
"""
_AS_IT_IS = {
    *(getattr(Tensor, name).__get__ for name in tensor_attributes() - {"T", "H", "mT", "mH", "data", "real", "imag"}),
    *torch_functions(*_METADATA.split()),
}
_REFUSED = {
    Tensor.requires_grad_: "be made to require a gradient",
    Tensor.requires_grad.__set__: "be made to require a gradient",  # type: ignore[attr-defined]
    Tensor.data.__set__: "be given other data",  # type: ignore[attr-defined]
}
_SHAPE_ONLY = {
    *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like),
    *(Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor),
}
