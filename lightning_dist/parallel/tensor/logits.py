"""Logits of which each rank holds some columns, and that code may use as any tensor."""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import _reduction
from torch.nn import functional as F

from lightning_dist.parallel.tensor.cross_entropy import vocab_cross_entropy
from lightning_dist.parallel.tensor.extremes import Largest
from lightning_dist.parallel.tensor.tracking import BY_ANY_ARGUMENT, BY_FIRST_ARGUMENT, IN_PLACE
from lightning_dist.parallel.tensor.vocabulary import Vocabulary
from lightning_dist.pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten


class VocabLogits(Tensor):
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

    vocabulary: Vocabulary
    vocab_dim: int
    _columns: Tensor
    _node: Any
    _source: tuple[VocabLogits, Callable[[Tensor], Tensor], int] | None
    _writes: list[int]
    _whole: tuple[Tensor, int, int] | None

    @staticmethod
    def from_local(columns: Tensor, mesh: DeviceMesh, vocab_size: int) -> VocabLogits:
        """Logits (..., vocab_size) from this rank's columns.

        Args:
            columns: (..., own width), this rank's by torch's chunk rule.
            mesh: 1-D, over which the vocabulary is split.
            vocab_size: of all ranks.

        Raises:
            ValueError: another number of columns than the rule gives this rank, or a mesh of more axes.
        """
        vocabulary = Vocabulary(mesh, vocab_size)
        if columns.shape[-1] != vocabulary.width:
            raise ValueError(
                f"this rank holds {vocabulary.width} of {vocab_size} columns; the tensor's shape is "
                f"{tuple(columns.shape)}"
            )
        return _split(columns, vocabulary, columns.ndim - 1)

    def to_local(self) -> Tensor:
        """This rank's columns, (..., own width, ...). No communication."""
        with torch._C.DisableTorchFunctionSubclass():
            return _columns(self)

    def full_tensor(self) -> Tensor:
        """The whole logits, plain and differentiable.

        Communication: one all-gather over the mesh, the first time. Backward none.
        """
        with torch._C.DisableTorchFunctionSubclass():
            return _full(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        start, width = self.vocabulary.start, self.vocabulary.width
        grad = f", grad_fn=<{self.grad_fn.name()}>" if self.grad_fn is not None else ""
        return (
            f"VocabLogits(shape={tuple(self.shape)}, columns {start}:{start + width} of dim {self.vocab_dim} here, "
            f"dtype={self.dtype}, device={str(self.device)!r}{grad})"
        )

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> VocabLogits:
        copied = _split(copy.deepcopy(self.to_local(), memo), self.vocabulary, self.vocab_dim)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(
            "logits split by vocabulary can't be pickled: a rank holds its columns only. Pickle logits.full_tensor(), "
            "called on every rank of the tensor-parallel mesh."
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
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
            return _wrapper(logits._columns.detach(), logits.vocabulary, logits.vocab_dim)
        if func._schema.is_mutable:
            raise RuntimeError(f"logits split by vocabulary can't be written by {func}: take logits.full_tensor()")
        with torch.no_grad():
            result = _without_gather(torch.add, logits, args, kwargs) if func is aten.add.Tensor else NotImplemented
            return _with_gather(func, args, kwargs) if result is NotImplemented else result


def _wrapper(columns: Tensor, vocabulary: Vocabulary, dim: int) -> VocabLogits:
    """A tensor of the whole shape that holds the columns; not in any graph."""
    shape = list(columns.shape)
    shape[dim] = vocabulary.size
    logits: VocabLogits = Tensor._make_wrapper_subclass(VocabLogits, shape, dtype=columns.dtype, device=columns.device)
    logits.vocabulary, logits.vocab_dim, logits._columns = vocabulary, dim, columns
    logits._node = logits._source = logits._whole = None
    logits._writes = [0]
    return logits


def _split(columns: Tensor, vocabulary: Vocabulary, dim: int) -> VocabLogits:
    logits: VocabLogits = _FromColumns.apply(columns, vocabulary, dim)
    logits._columns, logits._node = columns, logits.grad_fn
    return logits


def _columns(logits: VocabLogits) -> Tensor:
    """This rank's columns, in the graph of the logits.

    Usually the tensor that the logits were made from. Where a custom autograd function returned the logits (as
    reentrant checkpointing does), the graph reaches them through their own ``grad_fn`` only.
    """
    if logits.grad_fn is not logits._node:
        logits._columns, logits._node = _ToColumns.apply(logits), logits.grad_fn
    _write_back(logits)
    return logits._columns


def _full(logits: VocabLogits) -> Tensor:
    """The whole logits: kept ones, or through the logits that these are a view or a cast of, or gathered."""
    columns = _columns(logits)
    wants_graph = columns.requires_grad and torch.is_grad_enabled()
    values = None
    if logits._whole is not None and logits._whole[2] == logits._writes[0]:
        values = logits._whole[0]
        if values.requires_grad == wants_graph:
            return values
    if values is None and logits._source is not None:
        source, function, writes = logits._source
        if writes == logits._writes[0] and (source.numel() == logits.numel() or source._whole is not None):
            full = function(_full(source))
            full = full if wants_graph else full.detach()
            logits._whole = (full, full._version, logits._writes[0])
            return full
    full = _Gather.apply(columns, logits.vocabulary, logits.vocab_dim, values)
    logits._whole = (full, full._version, logits._writes[0])
    return full


def _write_back(logits: VocabLogits) -> None:
    """If the whole logits were written in place (through themselves or a view of them), so are the columns."""
    if logits._source is not None and logits._source[2] == logits._writes[0]:
        _write_back(logits._source[0])
    if logits._whole is None:
        return
    full, version, writes = logits._whole
    if writes == logits._writes[0] and full._version != version:
        logits._writes[0] += 1
        logits._whole = None
        logits._columns.copy_(logits.vocabulary.own(full, logits.vocab_dim))


def _without_gather(func: Any, logits: VocabLogits, args: Any, kwargs: Any) -> Any:
    """The result from this rank's columns and small messages, or NotImplemented."""
    try:
        if func in _GRAPH:
            return _GRAPH[func](*args, **kwargs)
        if func in _OVER_VOCABULARY:
            return _OVER_VOCABULARY[func](*args, **kwargs)
        if func in _SHAPE_ONLY:
            shaped = logits._columns.new_empty(1).expand(logits.shape)
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
    columns = _columns(logits)
    result = function(columns)
    if result is columns:
        logits._writes[0] += func in IN_PLACE
        return logits
    if isinstance(result, Tensor):
        return _derived(result, dim, logits, lambda full: _plain(func, logits, full, args, kwargs))
    parts = [
        _derived(part, dim, logits, lambda full, i=i: list(_plain(func, logits, full, args, kwargs))[i])  # type: ignore[misc]
        for i, part in enumerate(result)
    ]
    return tuple(parts) if isinstance(result, tuple | list) else iter(parts)


def _plain(func: Any, logits: VocabLogits, full: Tensor, args: Any, kwargs: Any) -> Any:
    return func(*[full if value is logits else value for value in args], **kwargs)


def _derived(columns: Tensor, dim: int, logits: VocabLogits, function: Callable[[Tensor], Tensor]) -> VocabLogits:
    """Logits from other logits; a view or a cast of them can share their gather."""
    result = _split(columns, logits.vocabulary, dim % columns.ndim)
    view = columns.untyped_storage().data_ptr() == logits._columns.untyped_storage().data_ptr()
    if view or columns.dtype != logits.dtype:
        result._source = (logits, function, logits._writes[0])
        result._writes = logits._writes
    return result


def _with_gather(func: Any, args: Any, kwargs: Any) -> Any:
    """The result from the whole logits."""
    leaves, spec = tree_flatten((args, kwargs))
    split = [leaf for leaf in leaves if isinstance(leaf, VocabLogits)]
    args, kwargs = tree_unflatten([_full(leaf) if isinstance(leaf, VocabLogits) else leaf for leaf in leaves], spec)
    result = func(*args, **kwargs)
    for logits in split:
        _write_back(logits)
    return result


def _cross_entropy(
    logits: VocabLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """``torch.nn.functional.cross_entropy``; NotImplemented for what it would refuse, or differentiates besides."""
    if not isinstance(logits, VocabLogits) or isinstance(target, VocabLogits):
        return NotImplemented
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    classes_dim = min(1, logits.ndim - 1)
    rows = list(logits.shape)
    del rows[classes_dim]
    probabilities = target.is_floating_point() and target.shape == logits.shape
    if (
        logits.vocab_dim != classes_dim
        or not (probabilities or (target.dtype in (torch.int64, torch.uint8) and list(target.shape) == rows))
        or (weight is not None and weight.shape != (logits.vocabulary.size,))
        or (target.requires_grad and torch.is_grad_enabled())
        or (probabilities and ignore_index >= 0)
        or reduction not in ("none", "mean", "sum")
        or not 0 <= label_smoothing <= 1
    ):
        return NotImplemented
    columns = _columns(logits).movedim(classes_dim, -1)
    if probabilities:
        target = target.movedim(classes_dim, -1).reshape(-1, logits.vocabulary.size)
    loss = vocab_cross_entropy(
        columns.reshape(math.prod(rows), logits.vocabulary.width),
        logits.vocabulary,
        target if probabilities else target.reshape(-1),
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    if not torch.is_autocast_enabled(columns.device.type):
        loss = loss.to(logits.dtype)
    return loss.reshape(rows) if reduction == "none" else loss


def _largest(logits: VocabLogits, dim: int, k: int, columns: Tensor) -> tuple[Tensor, Tensor] | None:
    if not isinstance(dim, int) or dim % logits.ndim != logits.vocab_dim:
        return None
    values, at = Largest.apply(columns.movedim(logits.vocab_dim, -1), logits.vocabulary, k)
    return values.movedim(-1, logits.vocab_dim), at.movedim(-1, logits.vocab_dim)


def _argmax(logits: VocabLogits, dim: int | None = None, keepdim: bool = False) -> Any:
    found = None if dim is None else _largest(logits, dim, 1, _columns(logits).detach())
    if found is None:
        return NotImplemented
    return found[1] if keepdim else found[1].squeeze(logits.vocab_dim)


def _max(logits: VocabLogits, dim: Any, keepdim: bool = False) -> Any:
    found = _largest(logits, dim, 1, _columns(logits))
    if found is None:
        return NotImplemented
    return torch.return_types.max(found if keepdim else [part.squeeze(logits.vocab_dim) for part in found])  # type: ignore[arg-type]


def _topk(logits: VocabLogits, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if not largest or not 0 < k <= logits.vocabulary.size:
        return NotImplemented
    found = _largest(logits, dim, k, _columns(logits))
    return NotImplemented if found is None else torch.return_types.topk(found)


def _grad(logits: VocabLogits, *_: Any) -> VocabLogits | None:
    grad = _columns(logits).grad
    return None if grad is None else _wrapper(grad, logits.vocabulary, logits.vocab_dim)


def _register_hook(logits: VocabLogits, hook: Callable[[Tensor], Tensor | None]) -> Any:
    def on_columns(grad: Tensor) -> Tensor | None:
        changed = hook(_wrapper(grad, logits.vocabulary, logits.vocab_dim))
        if changed is None or isinstance(changed, VocabLogits):
            return changed and changed.to_local()
        return logits.vocabulary.own(changed, logits.vocab_dim)

    return _columns(logits).register_hook(on_columns)


def _autograd_grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    grads = torch.autograd.grad(outputs, tree_map_only(VocabLogits, _columns, inputs), *args, **kwargs)
    return tuple(
        _wrapper(grad, wrt.vocabulary, wrt.vocab_dim) if isinstance(wrt, VocabLogits) and grad is not None else grad
        for wrt, grad in zip(inputs, grads, strict=True)
    )


class _FromColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, columns: Tensor, vocabulary: Vocabulary, dim: int) -> VocabLogits:
        ctx.vocabulary, ctx.dim = vocabulary, dim
        return _wrapper(columns.detach(), vocabulary, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        own = grad.to_local() if isinstance(grad, VocabLogits) else _Own.apply(grad, ctx.vocabulary, ctx.dim)
        return own, None, None


class _ToColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: VocabLogits) -> Tensor:
        ctx.vocabulary, ctx.dim = logits.vocabulary, logits.vocab_dim
        return logits._columns.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> VocabLogits:
        return _wrapper(grad, ctx.vocabulary, ctx.dim)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, columns: Tensor, vocabulary: Vocabulary, dim: int, values: Tensor | None) -> Tensor:
        ctx.vocabulary, ctx.dim = vocabulary, dim
        if values is not None:
            return values.detach()
        # an inference tensor has no version: writes to it would go unseen
        with torch.inference_mode(False):
            return vocabulary.gather(columns.detach(), vocabulary.widths, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Own.apply(grad, ctx.vocabulary, ctx.dim), None, None, None


class _Own(torch.autograd.Function):
    """This rank's columns of a whole gradient; for a second derivative, the transpose of the gather."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, vocabulary: Vocabulary, dim: int) -> Tensor:
        ctx.vocabulary, ctx.dim = vocabulary, dim
        return vocabulary.own(whole, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(gradient, ctx.vocabulary, ctx.dim, None), None, None


_AS_IT_IS = frozenset(
    [
        getattr(Tensor, name).__get__
        for name, value in vars(torch._C.TensorBase).items()
        if isinstance(value, types.GetSetDescriptorType)
        and name not in ("T", "H", "mT", "mH", "data", "grad", "_grad", "real", "imag", "_cdata")
    ]
    + [
        function
        for name in [
            "size",
            "dim",
            "ndimension",
            "numel",
            "nelement",
            "element_size",
            "stride",
            "is_floating_point",
            "is_complex",
            "is_contiguous",
            "is_signed",
            "get_device",
            "is_inference",
            "is_same_size",
            "__len__",
            "__hash__",
            "backward",
        ]
        for function in (getattr(torch, name, None), getattr(Tensor, name, None))
        if function is not None
    ]
)
_REFUSED = {
    Tensor.requires_grad_: "be made to require a gradient",
    Tensor.requires_grad.__set__: "be made to require a gradient",  # type: ignore[attr-defined]
    Tensor.data.__set__: "be given other data",  # type: ignore[attr-defined]
}
_GRAPH: dict[Any, Callable[..., Any]] = {
    Tensor.grad.__get__: _grad,  # type: ignore[union-attr]
    Tensor.retain_grad: lambda logits: _columns(logits).retain_grad(),
    Tensor.register_hook: _register_hook,
    torch.autograd.grad: _autograd_grad,
}
_OVER_VOCABULARY: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    torch.argmax: _argmax,
    Tensor.argmax: _argmax,
    torch.max: _max,
    Tensor.max: _max,
    torch.topk: _topk,
    Tensor.topk: _topk,
}
_SHAPE_ONLY = frozenset(
    [
        *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like),
        *(Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor),
    ]
)
