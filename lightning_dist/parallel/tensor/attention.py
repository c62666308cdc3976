"""Attention modules on this rank's heads whose forward calls a function with all heads, or writes their width out."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

from lightning_dist.parallel.tensor.mappings import gather, reduce_from_tensor_region
from lightning_dist.parallel.tensor.region import Region
from lightning_dist.random_states import shared_again


class LocalHeads(TorchFunctionMode):
    """While it lasts, ``F.multi_head_attention_forward`` runs on this rank's heads and sums their outputs.

    A mode also turns off torch's fast paths, which would not call it.

    Args:
        region: of the module.
        position_dim: of the function's query and output.

    Communication: forward one all-reduce of the output's bytes over the axis; one of the attention weights (averaged),
    or one all-gather of them (by head), where they are asked for.
    """

    def __init__(self, region: Region, position_dim: int) -> None:
        super().__init__()
        self.region, self.position_dim = region, position_dim

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.multi_head_attention_forward:
            return func(*args, **(kwargs or {}))
        partial, attention, bias = _attend(self.region.mesh, *args, **(kwargs or {}))
        shared_again()
        output = self.region.reduce_output(partial, self.position_dim)
        return output if bias is None else output + bias.to(output.dtype), attention


def _attend(
    mesh: DeviceMesh,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: None,
    bias_v: None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: None = None,
    static_v: None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """This rank's part of the output without the bias, the attention weights, the bias.

    With the signature of ``F.multi_head_attention_forward``; weights are this rank's, ``num_heads`` all ranks'.
    """
    is_batched = query.dim() == 3
    packed = None if use_separate_proj_weight else in_proj_weight
    if packed is not None and query is key and key is value:
        projected = list(F.linear(query, packed, in_proj_bias).chunk(3, -1))
    else:
        separate: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
        weights = separate if packed is None else packed.chunk(3)
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        projected = list(map(F.linear, (query, key, value), weights, biases))
    if not is_batched:
        projected = [x.unsqueeze(1) for x in projected]
    heads = num_heads // mesh.size()
    # (positions, batch, heads * width) to (batch, heads, positions, width)
    q, k, v = (x.reshape(x.shape[0], x.shape[1], heads, -1).permute(1, 2, 0, 3) for x in projected)
    mask = _mask(mesh, attn_mask, key_padding_mask, num_heads, q, k)
    dropout = dropout_p if training else 0.0
    attention: Tensor | None = None
    if need_weights:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        attention = (scores if mask is None else scores + mask).softmax(-1)
        attention = F.dropout(attention, dropout) if dropout else attention
        mixed = attention @ v
    else:
        is_causal = is_causal and key_padding_mask is None
        mixed = F.scaled_dot_product_attention(q, k, v, None if is_causal else mask, dropout, is_causal)
    partial = F.linear(mixed.permute(2, 0, 1, 3).flatten(2), out_proj_weight)
    if attention is not None:
        if average_attn_weights:
            attention = reduce_from_tensor_region(attention.sum(1), mesh) / num_heads
        else:
            attention = gather(attention, mesh, 1)
        attention = attention if is_batched else attention.squeeze(0)
    return partial if is_batched else partial.squeeze(1), attention, out_proj_bias


def _mask(
    mesh: DeviceMesh, attn_mask: Tensor | None, padding: Tensor | None, num_heads: int, q: Tensor, k: Tensor
) -> Tensor | None:
    """The sum of both masks, of floats, that broadcasts to (batch, this rank's heads, queries, keys)."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    if attn_mask is not None and attn_mask.dim() == 3:
        if attn_mask.shape[0] == batch * num_heads:  # one per head: this rank's
            first = mesh.get_local_rank() * heads
            attn_mask = attn_mask.view(batch, num_heads, queries, keys)[:, first : first + heads]
        else:
            attn_mask = attn_mask.unsqueeze(1)
    if padding is not None:
        padding = padding.view(-1, 1, 1, keys)
        attn_mask = padding if attn_mask is None else attn_mask + padding
    return attn_mask


class LocalWidth(TorchFunctionMode):
    """While it lasts, a reshape to the features of all heads is one to the features of this rank's, and so is a split.

    For modules that write ``x.transpose(1, 2).reshape(batch, positions, width)`` with the width of their input, or
    ``self.qkv(x).split(width, -1)``.

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
        elif func in (Tensor.split, torch.split):
            return func(*self._own_parts(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def _own_width(self, tensor: Tensor, *shape: Any) -> tuple[Any, ...]:
        sizes = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)) else list(shape)
        if sizes and sizes[-1] == self.width and all(isinstance(size, int) and size >= 0 for size in sizes):
            count = math.prod(sizes[:-1])
            if count * self.width != tensor.numel() and count * self.local == tensor.numel():
                return tensor, *sizes[:-1], self.local
        return tensor, *shape

    def _own_parts(
        self, tensor: Tensor, split_size: Any = None, dim: int = 0, split_size_or_sections: Any = None
    ) -> tuple[Any, ...]:
        split_size = split_size_or_sections if split_size is None else split_size
        parts = [split_size] * 3 if isinstance(split_size, int) else list(split_size)
        if parts == [self.width] * len(parts) and tensor.shape[dim] == len(parts) * self.local:
            return tensor, self.local, dim
        return tensor, split_size, dim


class AppliedWindows(LocalWidth):
    """The same for torchvision's shifted windows, whose forward is a function of weights and of the number of heads.

    Args:
        width, local: see :class:`LocalWidth`.
        heads: of all ranks; the function also scales by the width of one of them, so it has to be told all.
        weight: of the layer that writes back, as the forward sees it.
        mesh: of the tensor axis, over which that layer's partial sum is all-reduced.
    """

    def __init__(self, width: int, local: int, heads: int, weight: Tensor, mesh: DeviceMesh) -> None:
        super().__init__(width, local)
        self.heads, self.weight, self.mesh = heads, weight, mesh

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and args[1] is self.weight:
            partial = F.linear(args[0], self.weight)
            shared_again()
            output = reduce_from_tensor_region(partial, self.mesh)
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
