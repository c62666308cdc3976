"""The global gradient norm and clipping, over every mesh at once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dist.collectives import num_ranks
from lightning_dist.compat.operators import clamp_each, norm_of_each, scale_each
from lightning_dist.compat.torch import DisableTorchFunctionSubclass
from lightning_dist.dtensors import local_part, num_pieces
from lightning_dist.placeholder import PIPELINE_SHARE, held, is_placeholder


@torch.no_grad()
def global_norm(parameters: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of all gradients, as one process computes it; the same float on every rank.

    Every rank sums the powers of what it holds, each divided by the number of ranks that hold the same piece.

    Args:
        parameters: of this rank, plain or DTensors on any mesh; those without a gradient are left out. The norm is in
            float32 on their device, of float64 gradients in float64.
        norm_type: the p of the p-norm; ``inf`` for the largest absolute value.

    Communication: one all-reduce of one float64 over the world, none when nothing is sharded.
    """
    total, dtype, is_divided = share_of_powers(parameters, norm_type)
    if is_divided:
        dist.all_reduce(total, dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM)
    elif not math.isinf(norm_type):
        total = total * num_ranks()
    return (total if math.isinf(norm_type) else total ** (1 / norm_type)).to(dtype)


@torch.no_grad()
def share_of_powers(parameters: Iterable[Tensor], norm_type: float = 2.0) -> tuple[Tensor, torch.dtype, bool]:
    """This rank's share of the sum of powers of all gradients: the shares of all ranks add up to it. No communication.

    Returns:
        In float64, for ``inf`` the largest of this rank; the dtype of the norm; and whether ranks hold different
        pieces, which is the same on every rank, whatever it happens to hold.
    """
    parameters = list(parameters)
    in_stages = any(is_placeholder(p) or hasattr(p, PIPELINE_SHARE) for p in parameters)
    with DisableTorchFunctionSubclass():
        pairs = [(p, p.grad) for p in held(parameters) if p.grad is not None]
        pieces = [num_pieces(gradient) * getattr(p, PIPELINE_SHARE, 1) for p, gradient in pairs]
        shards = [local_part(gradient) for _, gradient in pairs]
    ranks = num_ranks()
    device = parameters[0].device if parameters else torch.device("cpu")
    dtype = torch.float64 if any(s.dtype == torch.float64 for s in shards) else torch.float32
    filled = [(s, n) for s, n in zip(shards, pieces, strict=True) if s.numel()]
    # a backend without float64 (mps) sums in float32
    wide = torch.float32 if device.type == "mps" else torch.float64
    total = torch.zeros((), dtype=wide, device=device)
    if filled:
        norms = torch.stack([n.to(device, wide) for n in norm_of_each([s for s, _ in filled], norm_type)])
        shares = _shares if type(norms) is Tensor else _shares.__wrapped__  # what a dry run makes is not for steps
        share = shares(tuple(n / ranks for _, n in filled), wide, device)
        total = norms.max() if math.isinf(norm_type) else (norms**norm_type * share).sum()
    return total, dtype, in_stages or any(n > 1 for n in pieces)


@lru_cache(maxsize=16)
def _shares(shares: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sent to the device once, as the host would wait for it in each step."""
    return torch.tensor(shares, dtype=dtype, device=device)


@torch.no_grad()
def clip_by_norm(
    parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Scales the gradients in place so that their global norm is at most ``max_norm``, as ``clip_grad_norm_`` does.

    Returns the norm before, see :func:`global_norm`, also for the communication. Raises a RuntimeError on every rank,
    before anything is scaled, if the norm is not finite and ``error_if_nonfinite``.
    """
    parameters = list(parameters)
    total = global_norm(parameters, norm_type)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"the total norm of order {norm_type} of the gradients is {float(total)}, so they can't be clipped; pass "
            "error_if_nonfinite=False to scale them by it all the same"
        )
    if shards := local_gradients(parameters):
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for device in dict.fromkeys(shard.device for shard in shards):  # two, where some are on the host
            scale_each([shard for shard in shards if shard.device == device], factor.to(device))
    return total


@torch.no_grad()
def clip_by_value(parameters: Iterable[Tensor], clip_value: float) -> None:
    """Clamps every gradient element to [-clip_value, clip_value] in place. Communication: none."""
    if shards := local_gradients(parameters):
        clamp_each(shards, -clip_value, clip_value)


def local_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """What this rank holds of gradients, those that are there, read without asking divided tensors in Python."""
    with DisableTorchFunctionSubclass():
        return [local_part(p.grad) for p in held(parameters) if p.grad is not None]
