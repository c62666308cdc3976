"""What a module hands to ``log``: numbers, also those that ranks hold together, or that another stage holds."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lightning_dist.compat.lightning import ResultCollection, logged_tensor, sizes_in_batch
from lightning_dist.placeholder import is_placeholder


def to_tensor(device: torch.device, value: Any, name: str) -> torch.Tensor:
    """In place of the method by which ``log`` takes a number: it drops the dims of a number, which torch refuses for
    one that is divided.

    Communication: of a parameter of one element, an all-gather of it.
    """
    if isinstance(value, DTensor) and value.ndim and value.numel() == 1:
        value = value.full_tensor().detach()
    return logged_tensor(device, value, name)


def first_batch_size(batch: Any) -> int:
    """The size of the first tensor in a batch, as Lightning finds it where it weights by it; else 1."""
    try:
        return next((size for size in sizes_in_batch(batch) if size is not None), 1)
    except RecursionError:
        return 1


def whole(results: ResultCollection, key: str, value: Any) -> Any:
    """The value as a plain tensor; None of a tensor that another stage of a pipeline holds.

    Communication: of a ``DTensor``, which all ranks of its mesh log, an all-reduce of one number per axis that it is
    divided over.

    Raises:
        ValueError: if one is logged with ``rank_zero_only=True``, as its other parts would be missing.
    """
    if is_placeholder(value):
        results[key].has_reset = True  # as if it had not been logged here
        return None
    if not isinstance(value, DTensor):
        return value
    meta = results[key].meta
    if meta.sync.rank_zero_only:
        raise ValueError(
            f"self.log({meta.name!r}, ..., rank_zero_only=True) got a number of which every rank holds a part: log it "
            "on every rank, or the number of value.full_tensor(), which every rank has to call"
        )
    return value.full_tensor()
