"""Many tensors sent as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 64 * 2**20
"""How much is copied into one flat tensor, at most, to be sent at once."""


def flat_broadcast(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Gives every rank of the group the values of its first rank, in place.

    Communication: the tensors' bytes, in broadcasts of at most 64 MB (or one tensor) each, over the group.
    """
    for same in buckets(tensors):
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in same])
        dist.broadcast(flat, dist.get_global_rank(group, 0), group)
        unflatten(flat, same)


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in groups of one dtype and at most ``BUCKET_BYTES``, or one tensor."""
    open_buckets: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        bucket = open_buckets.setdefault(tensor.dtype, [])
        if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = open_buckets[tensor.dtype] = []
        bucket.append(tensor)
    yield from open_buckets.values()


@torch.no_grad()
def unflatten(flat: Tensor, tensors: list[Tensor]) -> None:
    """Copies a flat tensor back into those that it was made of."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.detach().copy_(part.view(tensor.shape))
