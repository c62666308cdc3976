"""The states of an optimizer, of which each rank has those of its stages, as the user's code reads them."""

from __future__ import annotations

from collections import defaultdict
from types import FrameType, MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dist.divided.readers import meet
from lightning_dist.divided.tensor import as_divided
from lightning_dist.parallel.pipeline.stage_owner import Staged, are_plain, owner_of, staged
from lightning_dist.parallel.pipeline.user_frames import line_of_user
from lightning_dist.placeholder import placeholder


class StagedStates(defaultdict[Any, Any]):
    """The states of an optimizer, by parameter; of a parameter of another stage, that of its rank."""

    @classmethod
    def show(cls, optimizer: torch.optim.Optimizer) -> bool:
        """Puts them in place of the optimizer's own; whether those were there still."""
        if type(optimizer.state) is not defaultdict:
            return False
        optimizer.state = cls(dict, optimizer.state)
        return True

    @classmethod
    def hide(cls, optimizer: torch.optim.Optimizer) -> None:
        """Undoes :meth:`show`."""
        if type(optimizer.state) is cls:
            optimizer.state = defaultdict(dict, optimizer.state)

    def __getitem__(self, parameter: Any) -> Any:
        """The user's code gets what can be read, and tensors that can be written to."""
        if isinstance(parameter, Staged) and not are_plain() and (line := line_of_user()) is not None:
            return _state_of(self.get(parameter, {}), parameter, line)
        return super().__getitem__(parameter)


def _state_of(own: dict[str, Any], parameter: Any, line: FrameType) -> Any:
    """Communication over the pipeline: one broadcast of the names, shapes and numbers."""
    owner = owner_of(parameter)
    if owner.group is None or not dist.is_initialized():
        return MappingProxyType(own)
    meet(line, dist.get_process_group_ranks(owner.group))
    described: Any = {k: (tuple(v.shape), v.dtype) if isinstance(v, Tensor) else (v,) for k, v in own.items()}
    box = [described]
    dist.broadcast_object_list(box, group=owner.group, group_src=owner.source)
    there: dict[str, Any] = {}
    for key, what in box[0].items():
        if key in own:
            there[key] = staged(as_divided(own[key].detach()), owner) if isinstance(own[key], Tensor) else own[key]
        elif len(what) == 2:
            like = torch.empty(what[0], dtype=what[1], device="meta")
            there[key] = staged(placeholder(like, parameter.device), owner)
        else:
            (there[key],) = what
    return MappingProxyType(there)
