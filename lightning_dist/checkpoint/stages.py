"""A checkpoint whose parts lie in the stages of a pipeline: what other ranks hold is a placeholder here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dist.collectives import gather_objects
from lightning_dist.placeholder import is_placeholder, placeholder
from lightning_dist.pytree import Path, map_leaves


@dataclass(frozen=True)
class StageRanks:
    """Where this rank stands among those that hold the stages.

    Args:
        group: the ranks of the pipeline.
        writes: whether this rank, of all that hold the same stages, writes what each of them holds whole.
        device: of the group's backend.
    """

    group: dist.ProcessGroup
    writes: bool
    device: torch.device


@dataclass(frozen=True)
class _Elsewhere:
    """A tensor that another rank holds."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def with_other_stages(checkpoint: Mapping[str, Any], ranks: StageRanks) -> dict[str, Any]:
    """The checkpoint with the optimizer states of all stages, those of others as placeholders.

    An optimizer has a state for what it stepped over, so each rank has others; then all ranks have the same entries in
    the same order. Numbers and scalars come with their values.

    Communication over the pipeline: one all-gather of the states' names, shapes and scalars, as an object.
    """
    states = checkpoint.get("optimizer_states")
    if not states:
        return dict(checkpoint)
    mine = [map_leaves(state.get("state", {}), _described) for state in states]
    everyone = gather_objects(mine, ranks.group)
    whole = [_completed(state, [part[number] for part in everyone]) for number, state in enumerate(states)]
    return {**checkpoint, "optimizer_states": whole}


def _completed(state: dict[str, Any], parts: list[dict[Any, Any]]) -> dict[str, Any]:
    """One optimizer's state with the entries of all stages, in the order of its parameters."""
    if "param_groups" not in state:
        return state
    merged: dict[Any, Any] = {}
    for part in parts:
        for name, value in part.items():
            merged.setdefault(name, value)
    own = state["state"]
    in_order = [name for group in state["param_groups"] for name in group["params"]]
    names = [*(name for name in in_order if name in merged), *(name for name in merged if name not in in_order)]
    whole = {name: own[name] if name in own else map_leaves(merged[name], _as_placeholder) for name in names}
    return {**state, "state": whole}


def from_stages(checkpoint: Mapping[str, Any], ranks: StageRanks) -> dict[str, Any]:
    """The checkpoint with the tensors of all stages, on the first rank of the pipeline, in host memory.

    Communication over the pipeline: one all-gather of flags, as an object, and one send of each tensor that the first
    rank lacks, by the first rank that holds it.
    """
    flags: list[bool] = []

    def note(_: Path, value: Any) -> Any:
        if isinstance(value, Tensor):
            flags.append(not is_placeholder(value))
        return value

    map_leaves(dict(checkpoint), note)
    here = dist.get_rank(ranks.group)
    everyone = gather_objects(flags, ranks.group)
    sources = iter([next((rank for rank, held in enumerate(at) if held), 0) for at in zip(*everyone, strict=True)])
    received: dict[int, Tensor] = {}

    def bring(_: Path, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        source = next(sources)
        if source == 0 or (here != 0 and here != source):
            return value
        if here == source:
            dist.send(value.detach().to(ranks.device).contiguous(), group=ranks.group, group_dst=0)
            return value
        memory = torch.empty(value.shape, dtype=value.dtype, device=ranks.device)
        dist.recv(memory, group=ranks.group, group_src=source)
        return received.setdefault(id(value), memory.cpu())  # a tied parameter is one object

    return map_leaves(dict(checkpoint), bring)


def _described(_: Path, value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim:
        return _Elsewhere(tuple(value.shape), value.dtype)
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _as_placeholder(_: Path, value: Any) -> Any:
    if isinstance(value, _Elsewhere):
        return placeholder(torch.empty(value.shape, dtype=value.dtype, device="meta"), torch.device("cpu"))
    return value
