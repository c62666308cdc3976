"""What a module's forward writes out in full: its width, and the layer that writes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class LocalWidth(TorchFunctionMode):
    """While it lasts, a reshape to the features of all heads is one to the features of this rank's.

    For modules that write ``x.transpose(1, 2).reshape(batch, positions, width)`` with the width of their input.

    Args:
        width: features of all heads.
        local: of this rank's.
    """

    def __init__(self, width: int, local: int) -> None:
        super().__init__()
        self.width, self.local = width, local

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.reshape, Tensor.view, torch.reshape) and not kwargs:
            args = self._own_width(*args)
        return func(*args, **(kwargs or {}))

    def _own_width(self, tensor: Tensor, *shape: Any) -> tuple[Any, ...]:
        sizes = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)) else list(shape)
        if sizes and sizes[-1] == self.width and all(isinstance(size, int) and size >= 0 for size in sizes):
            count = 1
            for size in sizes[:-1]:
                count *= size
            if count * self.width != tensor.numel() and count * self.local == tensor.numel():
                return tensor, *sizes[:-1], self.local
        return tensor, *shape


class AppliedWindows(LocalWidth):
    """The same for torchvision's shifted windows, whose forward is a function of weights and of the number of heads.

    Args:
        width, local: see :class:`LocalWidth`.
        heads: of all ranks; the function also scales by the width of one of them, so it has to be told all.
        weight: of the layer that writes back, as the forward sees it.
        reduce: what that layer's partial sum, without the bias, goes through.
    """

    def __init__(self, width: int, local: int, heads: int, weight: Tensor, reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__(width, local)
        self.heads, self.weight, self.reduce = heads, weight, reduce

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and args[1] is self.weight:
            output = self.reduce(F.linear(args[0], self.weight))
            return output if args[2] is None else output + args[2].to(output.dtype)
        if func in (Tensor.reshape, Tensor.view):
            args = self._own_heads(*args)
        return super().__torch_function__(func, types, args, kwargs)

    def _own_heads(self, tensor: Tensor, *sizes: Any) -> tuple[Any, ...]:
        mine = self.heads * self.local // self.width
        if len(sizes) == 5 and sizes[2:4] == (3, self.heads):  # windows, positions, (q, k, v), heads, features
            return tensor, *sizes[:3], mine, sizes[4]
        if len(sizes) in (4, 5) and sizes[-3] == self.heads and sizes[-2] == sizes[-1] == tensor.shape[-1]:
            return tensor, *sizes[:-3], mine, *sizes[-2:]  # scores: heads, positions, positions
        return tensor, *sizes
