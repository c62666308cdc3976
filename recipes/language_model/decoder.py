"""A causal decoder: pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dist.data import document_mask

INITIAL_STD = 0.02


class Decoder(nn.Module):
    """A causal language model of the Llama family (https://arxiv.org/abs/2302.13971).

    It holds no buffers: rotary angles are computed from the positions, so a decoder built on the meta device has
    nothing but parameters to materialise.

    Args:
        vocab_size: number of tokens.
        width: features of a token; ``num_heads`` divides it.
        depth: number of blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads, each shared by ``num_heads / num_kv_heads`` query heads
            (https://arxiv.org/abs/2305.13245); by default ``num_heads``.
        feed_forward_width: hidden features of the feed-forward layer; by default 8/3 of ``width``, which has the
            parameters of a plain one of 4 times, rounded up to a multiple of 32.
        rope_base: base of the rotary frequencies (https://arxiv.org/abs/2104.09864).
        norm_eps: of the RMS norms.
        dropout: on attention's and the feed-forward layer's output.
        tie_embedding: the output projection is the token embedding.

    Raises:
        ValueError: heads that do not divide, or an odd number of features per head.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 256,
        depth: int = 4,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        feed_forward_width: int | None = None,
        *,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        tie_embedding: bool = True,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        feed_forward_width = feed_forward_width or 32 * math.ceil(width * 8 / 3 / 32)
        _check_heads(width, num_heads, num_kv_heads)
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, num_kv_heads, feed_forward_width, rope_base, norm_eps, dropout)
            for _ in range(depth)
        )
        self.norm = nn.RMSNorm(width, eps=norm_eps)
        self.head = nn.Linear(width, vocab_size, bias=False)
        if tie_embedding:
            self.head.weight = self.embedding.weight
        self._initialize(depth)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        """Logits of every token's successor.

        Args:
            tokens: ``(batch, length)``, int64.
            positions: ``(length,)`` or ``(batch, length)``, int64; by default 0 to ``length - 1``.
            document_ids: ``(batch, length)``, int64: a token attends to those of its own document; by default to all
                before it.

        Returns:
            ``(batch, length, vocab_size)``.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        mask = None if document_ids is None else document_mask(document_ids)
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden, positions, mask)
        return self.head(self.norm(hidden))

    def _initialize(self, depth: int) -> None:
        """Normal weights; those that write to the residual stream are scaled by its number of writers (GPT-2)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                writes = name.endswith((".output", ".down"))
                nn.init.normal_(module.weight, std=INITIAL_STD / (math.sqrt(2 * depth) if writes else 1.0))


class Block(nn.Module):
    """Attention and feed-forward layer, each on the normalised residual stream and added to it.

    Args: see :class:`Decoder`.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        feed_forward_width: int,
        rope_base: float,
        norm_eps: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=norm_eps)
        self.attention = Attention(width, num_heads, num_kv_heads, rope_base)
        self.feed_forward_norm = nn.RMSNorm(width, eps=norm_eps)
        self.feed_forward = FeedForward(width, feed_forward_width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(batch, length, width)`` at ``positions`` to the same shape; the mask is that of :class:`Attention`."""
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden), positions, mask))
        return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden)))


class Attention(nn.Module):
    """Causal self-attention with rotary positions and shared key and value heads.

    Args: see :class:`Decoder`.
    """

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, rope_base: float) -> None:
        super().__init__()
        self.head_width = width // num_heads
        self.rope_base = rope_base
        self.query = nn.Linear(width, num_heads * self.head_width, bias=False)
        self.key = nn.Linear(width, num_kv_heads * self.head_width, bias=False)
        self.value = nn.Linear(width, num_kv_heads * self.head_width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(batch, length, width)`` at ``positions`` ``(length,)`` or ``(batch, length)`` to the same shape.

        The mask ``(batch, 1, length, length)`` says what each token attends to; by default all before it.
        """
        angles = rotary_angles(positions, self.head_width, self.rope_base).unsqueeze(-3)
        query = rotate(self._split_heads(self.query(hidden)), angles)
        key = rotate(self._split_heads(self.key(hidden)), angles)
        value = self._split_heads(self.value(hidden))
        mixed = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1]
        )
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _split_heads(self, features: Tensor) -> Tensor:
        # The number of heads is left open: it is what this rank's part of the projection has.
        return features.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202).

    Args:
        width: features in and out.
        hidden_width: features between.
    """

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden_width, bias=False)
        self.up = nn.Linear(width, hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """``(..., width)`` to the same shape."""
        return self.down(F.silu(self.gate(hidden)) * self.up(hidden))


def rotary_angles(positions: Tensor, head_width: int, base: float) -> Tensor:
    """Angles ``(..., length, head_width / 2)`` of rotary positions ``(..., length)``, always in float32: bfloat16 can't
    count past 256.
    """
    exponents = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width
    return positions.float()[..., None] * base**-exponents


def rotate(features: Tensor, angles: Tensor) -> Tensor:
    """Turns every pair ``(i, i + head_width / 2)`` of ``(batch, heads, length, head_width)`` by its angle."""
    cos, sin = angles.cos(), angles.sin()
    first, second = features.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(features)


def _check_heads(width: int, num_heads: int, num_kv_heads: int) -> None:
    if width % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide width={width}; pass a divisor of it")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}; pass a divisor of it")
    if (width // num_heads) % 2:
        raise ValueError(
            f"width={width} over num_heads={num_heads} is {width // num_heads} features per head, which is odd; "
            "rotary positions turn pairs, so pass fewer heads or another width"
        )
