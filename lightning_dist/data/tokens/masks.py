"""Masks under which a token attends to what came before it in its own document."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def document_mask(document_ids: Tensor) -> Tensor:
    """For ``F.scaled_dot_product_attention``, as its ``attn_mask``: causal, and within documents.

    Args:
        document_ids: ``(batch, length)``, see :class:`~lightning_dist.data.TokenDataset`.

    Returns:
        ``(batch, 1, length, length)`` bool: whether the token of a row attends to that of a column.
    """
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return same.tril()[:, None]


def document_mask_mod(document_ids: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The same for flex attention: the ``mask_mod`` of ``create_block_mask`` with ``B=batch`` and ``H=None``.

    Args:
        document_ids: ``(batch, length)``, on the device of the attention.
    """

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document_ids[batch, query] == document_ids[batch, key]) & (query >= key)

    return mask_mod
