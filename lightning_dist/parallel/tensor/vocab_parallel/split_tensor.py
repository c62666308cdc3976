"""A tensor of which each rank holds some columns of a vocabulary: what it keeps, and how it becomes whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_dist.compat.torch import DisableTorchFunctionSubclass, version_of, wrapper_tensor
from lightning_dist.parallel.tensor.vocab_parallel.vocabulary import Vocabulary

T = TypeVar("T", bound="VocabTensor")


class VocabTensor(Tensor):
    """A tensor of global shape (..., V, ...) whose vocabulary dim is split over the ranks of a 1-D mesh.

    What operators do with it, a subclass says. Made by :meth:`from_columns` in a graph, and by :meth:`wrap` outside.

    Attributes:
        vocabulary: whose columns these are.
        vocab_dim: the dim that is split.

    [Note: one gather for all views]
    The whole tensor is gathered once, and kept. A view of a tensor, or a cast, takes that one's whole through the same
    function. All views of one memory share a count of writes, by which each knows whether what it keeps is still true;
    where the whole was written in place, so are the columns before they are used again.
    """

    vocabulary: Vocabulary
    vocab_dim: int
    _columns: Tensor
    _node: Any
    _source: tuple[VocabTensor, Callable[[Tensor], Tensor], int] | None
    _writes: list[int]
    _whole: tuple[Tensor, int, int] | None

    @classmethod
    def wrap(cls: type[T], columns: Tensor, vocabulary: Vocabulary, dim: int) -> T:
        """A tensor of the whole shape that holds the columns; not in any graph."""
        shape = list(columns.shape)
        shape[dim] = vocabulary.size
        tensor: T = wrapper_tensor(cls, shape, columns.dtype, columns.device)
        tensor.vocabulary, tensor.vocab_dim, tensor._columns = vocabulary, dim, columns
        tensor._node = tensor._source = tensor._whole = None
        tensor._writes = [0]
        return tensor

    @classmethod
    def from_columns(cls: type[T], columns: Tensor, vocabulary: Vocabulary, dim: int) -> T:
        """The same in the graph of the columns."""
        tensor: T = _FromColumns.apply(columns, vocabulary, dim, cls)
        tensor._columns, tensor._node = columns, tensor.grad_fn
        return tensor

    def to_local(self) -> Tensor:
        """This rank's columns, (..., own width, ...), in the graph of the tensor. No communication.

        Usually they are what the tensor was made from. Where a custom autograd function returned the tensor (as
        reentrant checkpointing does), the graph reaches them through its own ``grad_fn`` only.
        """
        with DisableTorchFunctionSubclass():
            if self.grad_fn is not self._node:
                self._columns, self._node = _ToColumns.apply(self), self.grad_fn
            self.write_back()
            return self._columns

    def full_tensor(self) -> Tensor:
        """The whole tensor, plain and differentiable; see [Note: one gather for all views].

        Communication: one all-gather over the mesh, the first time. Backward none.
        """
        with DisableTorchFunctionSubclass():
            columns = self.to_local()
            wants_graph = columns.requires_grad and torch.is_grad_enabled()
            values = self._whole[0] if self._whole is not None and self._whole[2] == self._writes[0] else None
            if values is not None and values.requires_grad == wants_graph:
                return values
            full = self._from_source(wants_graph) if values is None else None
            if full is None:
                full = _Gather.apply(columns, self.vocabulary, self.vocab_dim, values)
            self._whole = (full, version_of(full), self._writes[0])
            return full

    def local_values(self) -> Tensor:
        return self._columns.detach()

    def detached(self: T) -> T:
        return self.wrap(self.local_values(), self.vocabulary, self.vocab_dim)

    def derive(self: T, columns: Tensor, dim: int, function: Callable[[Tensor], Tensor]) -> T:
        """What a function makes of this tensor; a view or a cast shares its gather.

        Args:
            columns: what it makes of this rank's.
            dim: of the vocabulary in them.
            function: of the whole tensor.
        """
        result = self.from_columns(columns, self.vocabulary, dim % columns.ndim)
        view = columns.untyped_storage().data_ptr() == self._columns.untyped_storage().data_ptr()
        if view or columns.dtype != self.dtype:
            result._source = (self, function, self._writes[0])
            result._writes = self._writes
        return result

    def count_write(self) -> None:
        self._writes[0] += 1

    def write_back(self) -> None:
        """If the whole tensor was written in place (through itself or a view of it), so are the columns."""
        if self._source is not None and self._source[2] == self._writes[0]:
            self._source[0].write_back()
        if self._whole is None:
            return
        full, version, writes = self._whole
        if writes == self._writes[0] and version_of(full) != version:
            self._writes[0] += 1
            self._whole = None
            self._columns.copy_(self.vocabulary.own(full, self.vocab_dim))

    def _from_source(self, wants_graph: bool) -> Tensor | None:
        """The whole through the tensor that this is a view or a cast of, if that one's is there or no larger."""
        if self._source is None:
            return None
        source, function, writes = self._source
        if writes != self._writes[0] or (source.numel() != self.numel() and source._whole is None):
            return None
        full = function(source.full_tensor())
        return full if wants_graph else full.detach()

    def __deepcopy__(self: T, memo: dict[int, Any]) -> T:
        copied = self.from_columns(copy.deepcopy(self.to_local(), memo), self.vocabulary, self.vocab_dim)
        memo[id(self)] = copied
        return copied


class _FromColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, columns: Tensor, vocabulary: Vocabulary, dim: int, kind: type[VocabTensor]) -> VocabTensor:
        ctx.vocabulary, ctx.dim = vocabulary, dim
        return kind.wrap(columns.detach(), vocabulary, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        own = grad.to_local() if isinstance(grad, VocabTensor) else _Own.apply(grad, ctx.vocabulary, ctx.dim)
        return own, None, None, None


class _ToColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: VocabTensor) -> Tensor:
        ctx.vocabulary, ctx.dim, ctx.kind = tensor.vocabulary, tensor.vocab_dim, type(tensor)
        return tensor.local_values()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> VocabTensor:
        return ctx.kind.wrap(grad, ctx.vocabulary, ctx.dim)


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
