"""Microbatches: parts of a batch of any nested structure, and what their steps returned put together again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from lightning_dist.parallel.pipeline.nested import leaves, mapped

VALUES = (str, bytes, int, float)
"""What a list of one for each sample may hold."""


def batch_size(batch: Any) -> int:
    """Number of samples: the size that most tensors of the batch, or the first of them, have in their first dim.

    Raises:
        ValueError: there is no tensor to split.
    """
    sizes = Counter(leaf.shape[0] for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim)
    if not sizes:
        raise ValueError(
            f"pp splits a batch along the first dim of its tensors, and this one ({type(batch).__name__}) has none; "
            "give the step a nested structure of tensors"
        )
    return sizes.most_common(1)[0][0]


def split(batch: Any, num_parts: int) -> tuple[list[Any], list[int]]:
    """The batch in parts of nearly the same size, and their sizes; the first ones are larger by one.

    Tensors whose first dim is the batch are split, as views, and lists of as many plain values; everything else goes to
    every part as it is.
    """
    total = batch_size(batch)
    small, larger = divmod(total, num_parts)
    sizes = [small + (part < larger) for part in range(num_parts)]
    parts, begin = [], 0
    for size in sizes:
        parts.append(_part(batch, total, begin, begin + size))
        begin += size
    return parts, sizes


def first_samples(batch: Any, count: int) -> Any:
    """The first samples of a batch."""
    return _part(batch, batch_size(batch), 0, count)


def _part(batch: Any, total: int, begin: int, end: int) -> Any:
    def cut(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[begin:end] if leaf.ndim and leaf.shape[0] == total else leaf
        return leaf

    def visit(value: Any) -> Any:
        if type(value) in (list, tuple) and len(value) == total and all(isinstance(v, VALUES) for v in value):
            return value[begin:end]
        if type(value) is dict:
            return {key: visit(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(visit(item) for item in value)
        return mapped(value, cut)

    return visit(batch)


def joined(outputs: list[Any], sizes: list[int]) -> Any:
    """What the steps of all microbatches returned, as one.

    Tensors with the microbatch in their first dim are joined; numbers become their mean, weighted by size; lists of the
    microbatch's length are joined; dictionaries and sequences item by item. What is neither is given as the list of
    what the microbatches gave, and None where all gave None.
    """
    first = outputs[0]
    if all(output is None for output in outputs):
        return None
    if all(isinstance(output, Tensor) for output in outputs):
        if all(o.ndim and o.shape[0] == size for o, size in zip(outputs, sizes, strict=True)):
            return torch.cat(outputs)
        if first.numel() == 1:
            return weighted_mean(outputs, sizes)
        return outputs
    if all(isinstance(output, dict) and output.keys() == first.keys() for output in outputs):
        return {key: joined([output[key] for output in outputs], sizes) for key in first}
    if all(type(output) in (list, tuple) for output in outputs):
        if all(
            len(o) == size and not any(isinstance(v, Tensor) for v in o) for o, size in zip(outputs, sizes, strict=True)
        ):
            return type(first)(item for output in outputs for item in output)
        if all(len(output) == len(first) for output in outputs):
            return type(first)(joined([o[i] for o in outputs], sizes) for i in range(len(first)))
    if all(isinstance(output, (int, float)) and not isinstance(output, bool) for output in outputs):
        return sum(o * size for o, size in zip(outputs, sizes, strict=True)) / sum(sizes)
    return outputs


def weighted_mean(values: list[Tensor], weights: list[float] | list[int]) -> Tensor:
    """The mean of equally shaped tensors, weighted; in their own dtype where it is floating point."""
    if len(values) == 1:
        return values[0].detach()
    total = float(sum(weights))
    wide = [v.detach().double() if v.device.type != "mps" else v.detach().float() for v in values]
    mean = sum(v * (w / total) for v, w in zip(wide, weights, strict=True))
    assert isinstance(mean, Tensor)
    return mean.to(values[0].dtype) if values[0].is_floating_point() else mean.float()
