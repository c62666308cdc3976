"""What the steps of the microbatches returned, put together to what the step of the batch would have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def joined(outputs: list[Any], sizes: list[int], weights: list[float]) -> Any:
    """What the steps of all microbatches returned, as one.

    Tensors with the microbatch in their first dim are joined; numbers become their mean, weighted; lists of the
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
            return weighted_mean(outputs, weights)
        return outputs
    if all(isinstance(output, dict) and output.keys() == first.keys() for output in outputs):
        return {key: joined([output[key] for output in outputs], sizes, weights) for key in first}
    if all(type(output) in (list, tuple) for output in outputs):
        if all(
            len(o) == size and not any(isinstance(v, Tensor) for v in o) for o, size in zip(outputs, sizes, strict=True)
        ):
            return type(first)(item for output in outputs for item in output)
        if all(len(output) == len(first) for output in outputs):
            return type(first)(joined([o[i] for o in outputs], sizes, weights) for i in range(len(first)))
    if all(isinstance(output, (int, float)) and not isinstance(output, bool) for output in outputs):
        return sum(o * weight for o, weight in zip(outputs, weights, strict=True) if weight) / (sum(weights) or 1)
    return outputs


def weighted_mean(values: list[Tensor], weights: list[float] | list[int]) -> Tensor:
    """The mean of equally shaped tensors, weighted; in their own dtype where it is floating point."""
    if len(values) == 1:
        return values[0].detach()
    total = float(sum(weights))
    wide = [v.detach().double() if v.device.type != "mps" else v.detach().float() for v in values]
    if not total:
        return values[0].detach()
    mean = sum(v * (w / total) for v, w in zip(wide, weights, strict=True) if w)
    assert isinstance(mean, Tensor)
    return mean.to(values[0].dtype) if values[0].is_floating_point() else mean.float()
