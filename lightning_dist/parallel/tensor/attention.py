"""``nn.MultiheadAttention`` on this rank's heads."""

from __future__ import annotations

from typing import Any

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
        mesh: of the tensor axis.
        region: of the module.
        position_dim: of the function's query and output.

    Communication: forward one all-reduce of the output's bytes over ``mesh``; one of the attention weights (averaged),
    or one all-gather of them (by head), where they are asked for.
    """

    def __init__(self, mesh: DeviceMesh, region: Region, position_dim: int) -> None:
        super().__init__()
        self.mesh, self.region, self.position_dim = mesh, region, position_dim

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.multi_head_attention_forward:
            return func(*args, **(kwargs or {}))
        partial, attention, bias = _attend(self.mesh, *args, **(kwargs or {}))
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
    if use_separate_proj_weight:
        assert q_proj_weight is not None
        assert k_proj_weight is not None
        assert v_proj_weight is not None
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
    else:
        assert in_proj_weight is not None
        weights = in_proj_weight.chunk(3)  # type: ignore[assignment]
    if query is key and key is value and not use_separate_proj_weight:
        projected = list(F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1))  # type: ignore[arg-type]
    else:
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        inputs = (query, key, value)
        projected = [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
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
        attention = _all_heads(mesh, attention, average_attn_weights)
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


def _all_heads(mesh: DeviceMesh, attention: Tensor, average: bool) -> Tensor:
    """(batch, queries, keys) averaged over all heads, or (batch, heads, queries, keys) of all."""
    if average:
        return reduce_from_tensor_region(attention.sum(1), mesh) / (attention.shape[1] * mesh.size())
    return gather(attention, mesh, 1)
