"""Parameters that fully_shard gathered: what is written to them reaches this rank's part before they are freed.

[Note: writes to what is gathered]
While a unit of fully_shard is gathered its modules hold whole, plain parameters, and code in a step or a hook may write
to them: a momentum encoder, prototypes that are normalised. fully_shard frees them and would forget it. A write moves
the version counter of a tensor, and fully_shard's own gathering does not; ``.data`` has a counter of its own, so the
aliases that are handed out are remembered. What was written is copied to this rank's part before the memory is freed;
what is written to the part meanwhile (by an optimizer's reference, say) is gathered anew before the unit runs again.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_dist.compat.distributed import gathered_of, place_of, wrap_free_gathered, wrap_show_gathered
from lightning_dist.compat.torch import DisableTorchFunctionSubclass, EnableTorchFunction, own_parameters, version_of
from lightning_dist.divided.functions import Way, name_of, way_of
from lightning_dist.divided.tensor import as_divided
from lightning_dist.dtensors import local_part

_ALIASES = {"data": "data_aliases", "detach": "detached_aliases"}
"""Attributes of a gathered parameter that remember what was handed out."""


class GatheredParameter(nn.Parameter):
    """A whole, plain parameter while it is gathered; torch's functions see it as any other."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # first the divided ones are gathered
        way = way_of(func)
        with DisableTorchFunctionSubclass():
            if way is Way.SET_DATA and isinstance(args[0], GatheredParameter):
                return _assign(*args)
            if way is Way.COPY and isinstance(args[0], GatheredParameter):
                return _copy_of_part(*args)
            result = func(*args, **(kwargs or {}))
            if way is Way.ALIAS and (aliases := _ALIASES.get(name_of(func))):
                vars(args[0]).setdefault(aliases, []).append(result)
            return result


def watch(param_group: Any, sees_data: bool) -> None:
    """Makes a group of fully_shard's parameters keep what is written while they are gathered; where it ``sees_data``,
    by way of ``.data`` too: gathered parameters then have a class of their own.
    """
    if vars(param_group).get("is_watched"):
        return
    vars(param_group)["is_watched"] = True

    def show_gathered(original: Callable[[], None]) -> None:
        for parameter in param_group.fsdp_params:
            _refuse_removed(parameter)
        original()
        for parameter in param_group.fsdp_params:
            _begin(parameter, sees_data)

    def free_gathered(original: Callable[[], None]) -> None:
        if param_group.is_unsharded:
            for parameter in param_group.fsdp_params:
                write_back(parameter)
        original()

    wrap_show_gathered(param_group, show_gathered)
    wrap_free_gathered(param_group, free_gathered)


def _refuse_removed(parameter: Any) -> None:
    module, name = place_of(parameter)
    kind, there = type(module).__name__, own_parameters(module)
    if name not in there:
        raise RuntimeError(
            f"the parameter {name} of a {kind} was taken out of it (pruned, or parametrised) during the fit, while "
            "dp_shard divides it; do so before the fit, or use dp_replicate"
        )
    if not any(there[name] is own for own in (parameter.sharded_param, gathered_of(parameter))):
        raise RuntimeError(
            f"the {name} of a {kind} is another tensor (functional_call, or an assignment) while dp_shard divides it: "
            "the block would run with its own one; use dp_replicate, or write the values into the parameter"
        )


def _begin(parameter: Any, sees_data: bool) -> None:
    gathered = as_divided(gathered_of(parameter))
    if sees_data and type(gathered) is nn.Parameter:
        gathered.__class__ = GatheredParameter
        vars(gathered)["fsdp_param"] = weakref.ref(parameter)
    vars(gathered)["data_aliases"], vars(gathered)["detached_aliases"] = [], []
    vars(gathered)["versions_seen"] = version_of(local_part(gathered)), version_of(local_part(parameter.sharded_param))


def write_back(parameter: Any) -> None:
    """Copies this rank's part of a gathered parameter that was written to. Communication: none.

    Raises:
        RuntimeError: it was gathered in another dtype, which would round what was not written.
    """
    gathered: Any = gathered_of(parameter)
    whole, part = local_part(gathered), local_part(parameter.sharded_param)
    if whole.is_inference():  # has no version
        is_written = whole.dtype == part.dtype
    else:
        is_written = version_of(whole) != vars(gathered)["versions_seen"][0]
        is_written |= any(version_of(alias) for alias in vars(gathered)["data_aliases"])
    if not is_written:
        return
    if whole.dtype != part.dtype:
        raise RuntimeError(
            f"a parameter {tuple(gathered.shape)} was written to while dp_shard held it gathered in {whole.dtype}, and "
            f"it is kept in {part.dtype}: write to it between the steps, use precision='32-true', or dp_replicate"
        )
    dim, mesh = parameter.fsdp_placement.dim, parameter.mesh_info
    width = -(-whole.shape[dim] // mesh.shard_mesh_size)
    start = min(mesh.shard_mesh_rank * width, whole.shape[dim])
    with torch.no_grad():
        part.copy_(whole.narrow(dim, start, part.shape[dim] if part.numel() else 0).view_as(part))
    vars(gathered)["data_aliases"] = []
    vars(gathered)["versions_seen"] = version_of(whole), version_of(part)


def is_outdated(param_group: Any) -> bool:
    """Whether a part was written to since the group was gathered."""
    parameters = param_group.fsdp_params if param_group.is_unsharded else ()
    return any(vars(gathered_of(p))["versions_seen"][1] != version_of(local_part(p.sharded_param)) for p in parameters)


@torch.no_grad()
def _assign(target: Tensor, value: Tensor) -> None:
    """``target.data = value``: the values, in the memory that fully_shard knows."""
    if value.shape != target.shape or value.dtype != target.dtype:
        raise ValueError(
            f"`.data` of a parameter {tuple(target.shape)} {target.dtype}, which dp_shard divides, was assigned "
            f"{tuple(value.shape)} {value.dtype}: its shape and dtype stay those that it was divided with"
        )
    for alias in (*vars(target).get("data_aliases", ()), *vars(target).pop("detached_aliases", ())):
        alias.data = alias.clone()  # as what `.data` was before keeps its memory
    alias = target.data
    alias.copy_(value.full_tensor() if isinstance(value, DTensor) else value)
    vars(target)["data_aliases"] = [alias]


def _copy_of_part(tensor: Any, memo: dict[int, Any]) -> Any:
    parameter = vars(tensor)["fsdp_param"]()
    write_back(parameter)
    with EnableTorchFunction():
        copied = copy.deepcopy(parameter.sharded_param, memo)
    memo[id(tensor)] = copied
    return copied
