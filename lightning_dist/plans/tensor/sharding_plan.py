"""All that the tensor axis does to a module, and what follows from it for the module's parameters."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from lightning_dist.plans.tensor.plan import Split, TensorPlan, join_names
from lightning_dist.plans.tensor.sequence import SequenceBlocks, sequence_parameters


@dataclass(frozen=True)
class ShardingPlan:
    """What the tensor axis does to a module.

    Args:
        tensor_plan: the modules that it divides.
        sequence_blocks: blocks between which positions stay divided: sequence parallel.
        loss_parallel: logits stay divided by vocabulary.
    """

    tensor_plan: TensorPlan
    sequence_blocks: SequenceBlocks = field(default_factory=list)
    loss_parallel: bool = False


def parameter_splits(plan: TensorPlan) -> dict[str, Split]:
    """How each divided parameter is split, by its name (or names, where it is tied)."""
    splits = {join_names(name, below): how for name, part in plan.items() for below, how in part.parameters.items()}
    rows = {join_names(name, row, "weight"): how for name, part in plan.items() for row, how in part.rows.items()}
    return splits | rows


def partial_parameters(module: nn.Module, plan: ShardingPlan) -> list[str]:
    """Names of the replicated parameters whose gradient each rank has only its part of."""
    of_heads = [join_names(name, below) for name, part in plan.tensor_plan.items() for below in part.partial]
    in_blocks = sequence_parameters(module, set(parameter_splits(plan.tensor_plan)), plan.sequence_blocks)
    return list(dict.fromkeys([*of_heads, *in_blocks]))
