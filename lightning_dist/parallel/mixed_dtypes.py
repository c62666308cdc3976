"""Units of which some parameters are gathered in 16 bits and the others in float32.

[Note: dtypes in a unit]
fully_shard has one dtype in which the parameters of a unit are gathered. Under autocast that is wrong for some of them:
in one process an embedding's output and a norm's weights are float32, and a norm on the CPU takes no weights of 16 bits
beside inputs of 32. The unit still has one all-gather, of bytes, and one reduce-scatter, in float32: gradients of 16
bits are cast before it where fully_shard would cast them in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from torch import nn

from lightning_dist.compat.distributed import gathered_of, param_groups_of, place_of, wrap_decide_dtypes

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
    """Has a sharded unit gather its parameters in the dtype in which they are kept, but for those in some places."""
    for param_group in param_groups_of(unit):
        wrap_decide_dtypes(param_group, partial(_decide_dtypes, param_group, rounded))


def _decide_dtypes(param_group: Any, rounded: set[Place], decide: Callable[[], None]) -> None:
    decide()
    for parameter in param_group.fsdp_params:
        module, name = place_of(parameter)
        if (id(module), name) not in rounded:
            parameter.param_dtype = None


def make_gradients_alike(param_group: Any) -> None:
    """Casts those of 16 bits before a unit's gradients are reduced, where others are not; see [Note: dtypes in a unit].

    Communication: none.
    """
    if len({parameter.param_dtype for parameter in param_group.fsdp_params}) < 2:
        return
    for parameter in param_group.fsdp_params:
        if gathered_of(parameter) is not None:
            parameter.accumulate_unsharded_grad_if_needed()
            parameter.to_accumulated_grad_if_needed()
