"""A tensor of one stage, given to all ranks of the pipeline where the user's code asks for its values."""

from __future__ import annotations

from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_dist.divided.readers import meet
from lightning_dist.divided.whole import whole as gathered
from lightning_dist.parallel.pipeline.stage_owner import Staged, StageOwner, owner_of
from lightning_dist.parallel.pipeline.user_frames import where


def beside(target: Any, leaf: Any, what: str, line: FrameType) -> Any:
    """An argument beside a staged tensor: as it is if it is of the same owner or of none, else sent."""
    if not isinstance(leaf, Staged) or leaf is target or not isinstance(target, Staged):
        return leaf
    return leaf if owner_of(leaf).source == owner_of(target).source else whole_of(leaf, what, line)


def whole_of(leaf: Any, what: str, line: FrameType) -> Any:
    """The values of a staged tensor, sent; anything else as it is."""
    if not isinstance(leaf, Staged):
        return leaf
    assert isinstance(leaf, Tensor)
    return sent(leaf.detach(), owner_of(leaf), what, line)


def sent(tensor: Tensor, owner: StageOwner, what: str, line: FrameType) -> Tensor:
    """A tensor that the owner's rank has. Communication: one broadcast over the pipeline.

    Raises:
        RuntimeError: it can't be sent, or not all ranks ask.
    """
    if owner.group is None or not dist.is_initialized():
        raise RuntimeError(
            f"pp: {where(line)}: {what} {owner.name}, which the process of another stage held: this one knows its "
            "shape only, and the process group is gone; read it in a hook of the fit, or from a checkpoint"
        )
    meet(line, dist.get_process_group_ranks(owner.group))
    is_source = dist.get_rank(owner.group) == owner.source
    if not is_source:
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    elif isinstance(tensor, DTensor):
        value = gathered(tensor).detach().contiguous()
    else:
        value = tensor.as_subclass(Tensor).contiguous().clone()
    dist.broadcast(value, group=owner.group, group_src=owner.source)
    return value
