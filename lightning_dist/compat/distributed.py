"""Private names of torch.distributed: process groups, divided tensors, checkpoints, and fully_shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from io import IOBase
from typing import IO, Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from torch import Tensor, nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.checkpoint.utils import _create_file_view
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store as default_store
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor, Placement, _redistribute
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

from lightning_dist.compat.names import getter, hands_on, method, name_of, uses

T = TypeVar("T")

_OFFSETS = "torch.distributed.tensor._utils.compute_local_shape_and_global_offset"
_STRIDED = "torch.distributed.tensor.placement_types._StridedShard"
hands_on(
    {
        "torch.distributed._functional_collectives": "collectives that return tensors, which torch.compile traces",
        "torch.distributed.distributed_c10d._get_default_store": "the store of the world, over which its ranks met",
        "torch.distributed._composable_state._module_state_mapping": "finds what fully_shard keeps on a module",
        "torch.distributed.tensor.debug._clear_sharding_prop_cache": "empties a cache of DTensor's",
        "torch.distributed._composable.contract.REGISTRY_KEY": "finds what fully_shard keeps on a module",
        "torch.distributed._composable.contract.STATE_KEY": "finds what fully_shard keeps on a module",
        _OFFSETS: "tells which part of a DTensor a rank holds, as torch's distributed checkpoints ask it",
        _STRIDED: "the placement of what fully_shard divides where the tensor axis has divided it before",
    }
)

RANK_NOT_IN_GROUP = name_of(
    "torch.distributed.distributed_c10d._rank_not_in_group", "the function that every collective asks about its group"
)
num_collectives = method(
    "torch.distributed.distributed_c10d.ProcessGroup._get_sequence_number_for_group",
    "how many collectives this rank has begun in a group",
)
flattened_mesh = method(
    "torch.distributed.device_mesh.DeviceMesh._flatten",
    "joins the axes of a mesh into one. Communication: makes its process groups",
)


@uses("torch.distributed.tensor.DTensor._local_tensor")
def local_tensor(tensor: DTensor) -> Tensor:
    """Gives this rank's part of a divided tensor, without autograd."""
    return tensor._local_tensor


@uses("torch.distributed.tensor._dtensor_spec.DTensorSpec", "torch.distributed.tensor._dtensor_spec.TensorMeta")
def dtensor_where_it_is(
    local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: torch.Size, stride: tuple[int, ...]
) -> DTensor:
    """A divided tensor whose part stays on its device; ``from_local`` moves it to that of the mesh."""
    spec = DTensorSpec(mesh, tuple(placements), TensorMeta(shape, stride, local.dtype))
    return DTensor(local, spec, requires_grad=False)


@uses("torch.distributed.checkpoint.utils._create_file_view")
def part_of_file(file: IO[bytes], offset: int, length: int) -> Any:
    """A part of a file as a file, as torch's own reader of distributed checkpoints makes it."""
    return _create_file_view(cast(IOBase, file), offset, length)


@uses("torch.distributed.tensor._redistribute._gen_transform_infos")
def forget_earlier_meshes() -> None:
    """Empties the caches in which DTensor keeps what it inferred of equal meshes.

    A mesh equals an earlier one of the same ranks, also where that one's process groups are gone, since its process
    group was destroyed; results would then name groups that can't be found.
    """
    _clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()


# --- fully_shard ---

_FSDP = "torch.distributed.fsdp._fully_shard"
_STATE = f"{_FSDP}._fsdp_state.FSDPState"
_GROUP = f"{_FSDP}._fsdp_param_group.FSDPParamGroup"
_PARAMETER = f"{_FSDP}._fsdp_param.FSDPParam"

STATE_KEYS = (STATE_KEY, REGISTRY_KEY)
"""Attributes under which a module keeps what torch's composable transforms know of it."""

_state = method("torch.distributed.fsdp.FSDPModule._get_fsdp_state", "what fully_shard knows of a module")
free_gathered = method(f"{_GROUP}._to_sharded", "registers a group's shards again, and frees what was gathered")


@uses(f"{_PARAMETER}._unsharded_param")
def gathered_of(parameter: Any) -> nn.Parameter | None:
    """The whole parameter of one that is sharded, if it was gathered once."""
    return getattr(parameter, "_unsharded_param", None)


@uses(f"{_STATE}._fsdp_param_groups")
def param_groups_of(unit: nn.Module) -> list[Any]:
    """The groups of a unit's parameters that fully_shard communicates at once."""
    return list(_state(unit)._fsdp_param_groups)


@uses(_STATE)
def is_fully_shards(hook: Any) -> bool:
    """Whether a hook on a tensor is one that fully_shard puts on what a unit returns; it does not look at gradients."""
    return isinstance(getattr(hook, "__self__", None), FSDPState)


@uses(f"{_STATE}._is_root")
def has_run(root: nn.Module) -> bool:
    """Whether a root has had a first forward, in which fully_shard settles which module is a root."""
    return _state(root)._is_root is not None


@uses(f"{_STATE}._pre_forward", f"{_STATE}._post_forward")
def call_gathered(unit: nn.Module, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    """Runs a function as fully_shard runs the unit's forward: gathered, and with the unit's hooks on the backward."""
    state = _state(unit)
    args, kwargs = state._pre_forward(unit, args, kwargs)
    return state._post_forward(unit, args, function(*args, **kwargs))


@uses(f"{_STATE}._pre_forward_hook_handle", f"{_STATE}._post_forward_hook_handle")
def remove_forward_hooks(unit: nn.Module) -> None:
    """Takes off the hooks that gather a unit before its forward and free it after."""
    state = _state(unit)
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()


@uses(f"{_STATE}._state_ctx", f"{_STATE}._root_post_backward_final_callback")
def end_backward(root: nn.Module) -> None:
    """Reduces gradients below a root, as a backward pass's end and torch's schedules (``perform_reduce_grad``) do."""
    state = _state(root)
    for inner in state._state_ctx.all_states:
        for param_group in inner._fsdp_param_groups:
            param_group.post_backward()
    state._root_post_backward_final_callback()


def _wrapper(name: str, purpose: str) -> Callable[[Any, Callable[..., None]], None]:
    """The function that wraps a method of a group: ``around(original)`` runs instead of it."""
    hands_on({f"{_GROUP}.{name}": purpose})

    def wrap(param_group: Any, around: Callable[..., None]) -> None:
        setattr(param_group, name, partial(around, getattr(param_group, name)))

    return wrap


wrap_show_gathered = _wrapper("_to_unsharded", "registers a group's gathered parameters with their modules")
wrap_free_gathered = _wrapper("_to_sharded", "registers a group's shards again, and frees what was gathered")
wrap_free_after_forward = _wrapper("_to_sharded_post_forward", "shards a group over a smaller mesh after its forward")
wrap_decide_dtypes = _wrapper("_init_mp_dtypes", "gives each parameter of a group the dtype it is gathered in")


@uses(f"{_PARAMETER}._module_info")
def place_of(parameter: Any) -> tuple[nn.Module, str]:
    """The module that a parameter of fully_shard's is registered with first, and its name there."""
    return parameter._module_info.module, parameter._module_info.param_name


def own_class(unit: nn.Module) -> type[nn.Module]:
    """The user's class, of which fully_shard made one of its own."""
    bases = type(unit).__mro__[1:]
    return next(base for base in bases if not issubclass(base, FSDPModule) and issubclass(base, nn.Module))


@uses(f"{_GROUP}._module_to_pre_save_state_dict_hook_handle", f"{_PARAMETER}._post_load_hook_handle")
@uses(f"{_GROUP}._module_to_pre_load_state_dict_hook_handle")
def remove_fully_shard(unit: nn.Module) -> None:
    """Takes fully_shard off a module: class, hooks and state. Its parameters stay shards, for others to be put there.

    Communication: none.
    """
    if not isinstance(unit, FSDPModule):
        return
    unit.reshard()
    remove_forward_hooks(unit)
    for param_group in param_groups_of(unit):
        handles = [
            *param_group._module_to_pre_save_state_dict_hook_handle.values(),
            *param_group._module_to_pre_load_state_dict_hook_handle.values(),
            *(parameter._post_load_hook_handle for parameter in param_group.fsdp_params),
        ]
        for handle in handles:
            handle.remove()
    _module_state_mapping.pop(unit, None)
    unit.__class__ = own_class(unit)  # type: ignore[assignment]
    for child in unit.modules():
        for name in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
            vars(child).pop(name, None)
    for key in STATE_KEYS:
        vars(unit).pop(key, None)


@uses(
    "torch.distributed.distributed_c10d.ProcessGroup._get_backend",
    "torch.distributed.distributed_c10d.ProcessGroupGloo._Options._timeout",
)
def timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    """The timeout of a group's collectives for tensors of a device."""
    return group._get_backend(device).options._timeout


@uses("torch._C._distributed_c10d._dump_fr_trace_json", "torch._C._distributed_c10d._dump_nccl_trace_json")
def unfinished_collectives() -> list[dict[str, Any]]:
    """What torch's flight recorder has of collectives that this rank has not seen the end of, oldest first: with
    ``profiling_name``, ``process_group`` (name and description), ``time_created_ns``, ``timeout_ms``.

    On gloo, one that is done stays among them until somebody waits for it, and ``send`` and ``recv`` are not recorded.
    """
    recorder: Any = torch._C._distributed_c10d
    names = ("_dump_fr_trace_json", "_dump_nccl_trace_json")  # a build without NCCL lacks the second
    dumps = [json.loads(getattr(recorder, name)()) for name in names if hasattr(recorder, name)]
    entries = [entry for dump in dumps for entry in dump.get("entries", ()) if not entry["retired"]]
    return sorted(entries, key=lambda entry: entry["time_created_ns"])
