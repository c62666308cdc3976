"""Private names of torch's fully_shard."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp import FSDPModule

from lightning_dist.compat.names import hands_on, uses

T = TypeVar("T")

_FSDP = "torch.distributed.fsdp._fully_shard"
_STATE, _GROUP, _PARAMETER = (
    f"{_FSDP}._fsdp_state.FSDPState",
    f"{_FSDP}._fsdp_param_group.FSDPParamGroup",
    f"{_FSDP}._fsdp_param.FSDPParam",
)

STATE_KEYS = (STATE_KEY, REGISTRY_KEY)
"""Attributes under which a module keeps what torch's composable transforms know of it."""

hands_on("torch.distributed._composable.contract.STATE_KEY", "finds what fully_shard keeps on a module")
hands_on("torch.distributed._composable.contract.REGISTRY_KEY", "finds what fully_shard keeps on a module")


@uses(f"{_FSDP}._fully_shard.FSDPModule._get_fsdp_state")
def _state(unit: Any) -> Any:
    """Finds what fully_shard knows of a module."""
    return unit._get_fsdp_state()


@uses(f"{_STATE}._fsdp_param_groups")
def param_groups_of(unit: nn.Module) -> list[Any]:
    """The groups of a unit's parameters that fully_shard communicates at once."""
    return list(_state(unit)._fsdp_param_groups)


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
    """Reduces the gradients of all units below a root, as the end of a backward pass does.

    So do torch's pipeline schedules for a stage (``perform_reduce_grad``).
    """
    state = _state(root)
    for inner in state._state_ctx.all_states:
        for param_group in inner._fsdp_param_groups:
            param_group.post_backward()
    state._root_post_backward_final_callback()


# --------------------------------------------------------------------- a group of parameters


@uses(f"{_GROUP}._to_unsharded")
def wrap_show_gathered(param_group: Any, around: Callable[..., None]) -> None:
    """Wraps what registers a group's gathered parameters with their modules: ``around(original)`` runs instead."""
    param_group._to_unsharded = partial(around, param_group._to_unsharded)


@uses(f"{_GROUP}._to_sharded")
def wrap_free_gathered(param_group: Any, around: Callable[..., None]) -> None:
    """Wraps what registers a group's shards again, and frees what was gathered: ``around(original)`` runs instead."""
    param_group._to_sharded = partial(around, param_group._to_sharded)


@uses(f"{_GROUP}._to_sharded_post_forward")
def wrap_free_after_forward(param_group: Any, around: Callable[..., None]) -> None:
    """Wraps what shards a group over a smaller mesh after its forward: ``around(original)`` runs instead."""
    param_group._to_sharded_post_forward = partial(around, param_group._to_sharded_post_forward)


@uses(f"{_GROUP}._init_mp_dtypes")
def wrap_decide_dtypes(param_group: Any, around: Callable[..., None]) -> None:
    """Wraps what gives each parameter of a group the dtype it is gathered in: ``around(original)`` runs instead."""
    param_group._init_mp_dtypes = partial(around, param_group._init_mp_dtypes)


def free_gathered(param_group: Any) -> None:
    """Registers a group's shards again, and frees what was gathered."""
    param_group._to_sharded()


# --------------------------------------------------------------------- a parameter


@uses(f"{_PARAMETER}._unsharded_param")
def gathered_of(parameter: Any) -> nn.Parameter | None:
    """The whole parameter of one that fully_shard has gathered once, gathered now or not."""
    return getattr(parameter, "_unsharded_param", None)


@uses(f"{_PARAMETER}._module_info")
def place_of(parameter: Any) -> tuple[nn.Module, str]:
    """The module that a parameter of fully_shard's is registered with first, and its name there."""
    return parameter._module_info.module, parameter._module_info.param_name


# --------------------------------------------------------------------- taking it off


def own_class(unit: nn.Module) -> type[nn.Module]:
    """The user's class, of which fully_shard made one of its own."""
    return next(
        base for base in type(unit).__mro__[1:] if not issubclass(base, FSDPModule) and issubclass(base, nn.Module)
    )


@uses(
    f"{_GROUP}._module_to_pre_save_state_dict_hook_handle",
    f"{_GROUP}._module_to_pre_load_state_dict_hook_handle",
    f"{_PARAMETER}._post_load_hook_handle",
    "torch.distributed._composable_state._module_state_mapping",
)
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


@uses("torch.nn.Module._parameters")
def put_parameter(module: nn.Module, name: str, parameter: Tensor) -> None:
    """Registers a parameter in the place of another, whatever class either is of."""
    module._parameters[name] = parameter  # type: ignore[assignment]
