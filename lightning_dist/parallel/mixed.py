"""Units of which some parameters are gathered in 16 bits and the others in float32.

[Note: dtypes in a unit]
fully_shard has one dtype in which the parameters of a unit are gathered. Under autocast that is wrong for some of them:
in one process an embedding's output and a norm's weights are float32, and a norm on the CPU takes no weights of 16 bits
beside inputs of 32. The unit still has one all-gather, of bytes, and one reduce-scatter, in float32: gradients of 16
bits are cast before it where fully_shard would cast them in it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

Place = tuple[int, str]
"""A module, by id, and the name of a parameter in it."""


def places(module: nn.Module, parameters: Collection[nn.Parameter]) -> set[Place]:
    """Where parameters are; fully_shard puts others in their places."""
    return {
        (id(child), name)
        for child in module.modules()
        for name, parameter in child.named_parameters(recurse=False)
        if parameter in parameters
    }


def gather_as_kept(unit: nn.Module, rounded: set[Place]) -> None:
    """Has a sharded unit gather its parameters in the dtype in which they are kept, but for those in some places.

    Works around private parts of fully_shard, as seen in torch 2.14.
    """
    for param_group in param_groups_of(unit):
        settle = param_group._init_mp_dtypes

        def settle_each(param_group: Any = param_group, settle: Any = settle) -> None:
            settle()
            for parameter in param_group.fsdp_params:
                place = parameter._module_info
                if (id(place.module), place.param_name) not in rounded:
                    parameter.param_dtype = None

        param_group._init_mp_dtypes = settle_each


def make_gradients_alike(param_group: Any) -> None:
    """Casts those of 16 bits before a unit's gradients are reduced, where others are not; see [Note: dtypes in a unit].

    Communication: none.
    """
    if len({parameter.param_dtype for parameter in param_group.fsdp_params}) < 2:
        return
    for parameter in param_group.fsdp_params:
        if hasattr(parameter, "_unsharded_param"):
            parameter.accumulate_unsharded_grad_if_needed()
            parameter.to_accumulated_grad_if_needed()


def param_groups_of(unit: nn.Module) -> list[Any]:
    """The groups of parameters that fully_shard communicates at once (private; seen in torch 2.14 and 2.15)."""
    assert isinstance(unit, FSDPModule)
    return list(unit._get_fsdp_state()._fsdp_param_groups)
