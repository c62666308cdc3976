"""From what a user asks of the tensor axis to the sharding plan of a module, sequence-parallel blocks included."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from lightning_dist.compat.torch import NormBase
from lightning_dist.plans.blocks import CONTAINERS, class_name
from lightning_dist.plans.tensor import layers
from lightning_dist.plans.tensor.general import general_plan, vocabulary_plan
from lightning_dist.plans.tensor.plan import (
    ModulePlan,
    SequenceBlocks,
    ShardingPlan,
    TensorPlan,
    join_names,
    partial_parameters,
)
from lightning_dist.plans.tensor.styles import Styles, declared_plan, styled_plan


@dataclass(frozen=True)
class TensorOptions:
    """What a user asks of the tensor axis; see :class:`~lightning_dist.HybridStrategy`."""

    styles: Styles | None = None
    sequence_parallel: bool = False
    loss_parallel: bool = False

    def sharding_plan(self, module: nn.Module, tp: int, blocks: dict[str, nn.Module]) -> ShardingPlan | None:
        """The plan of a whole module, with these repeated parts by name, over ``tp`` ranks; None for one.

        Raises:
            ValueError: see :func:`find_tensor_plan`, :func:`check` and :func:`find_sequence_blocks`.
        """
        if tp == 1:
            return None
        tensor_plan = find_tensor_plan(module, self.styles)
        check(tensor_plan, tp)
        sequence_blocks = find_sequence_blocks(module, tensor_plan, blocks) if self.sequence_parallel else []
        plan = ShardingPlan(tensor_plan, sequence_blocks, self.loss_parallel)
        _validate_not_shared(module, plan)
        return plan


def find_tensor_plan(module: nn.Module, styles: Styles | None = None) -> TensorPlan:
    """The plan of a network: the user's; else what the general rule recognises, and what a model declares beside it.

    Raises:
        ValueError: nothing in it can be divided, or the user's plan does not fit it.
    """
    if styles is not None:
        return styled_plan(module, styles)
    plan = general_plan(module)
    for name, part in declared_plan(module).items():
        if name not in plan and not any(_overlap(name, other) for own in plan for other in _places(own, plan[own])):
            plan[name] = part
    plan |= vocabulary_plan(module, plan)
    if not plan:
        kinds = sorted({type(child).__name__ for child in module.modules() if [*child.parameters(recurse=False)]})
        raise ValueError(
            "tp finds nothing to divide: no attention and no feed-forward pair of dense layers among "
            f"{', '.join(kinds[:8]) or 'its layers'}. Convolutional networks have no tensor plan: use dp_shard, which "
            "divides any network's states; or name layers in tensor_plan="
        )
    return plan


def _places(name: str, part: ModulePlan) -> list[str]:
    """What a part takes up: its module, or of a block the layers in it."""
    return [join_names(name, layer) for layer in (*part.columns, *part.rows)] if part.columns else [name]


def _overlap(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.")


def check(plan: TensorPlan, tp: int) -> None:
    """Raises a ValueError if the axis does not divide what it has to, with the degrees that would do."""
    for name, part in plan.items():
        for what, number in part.divides.items():
            if number % tp:
                common = math.gcd(*(n for other in plan.values() for n in other.divides.values()))
                degrees = ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)
                raise ValueError(
                    f"tp={tp} does not divide the {number} {what} of {name or 'the module'}; degrees that do: {degrees}"
                )


def _validate_not_shared(module: nn.Module, plan: ShardingPlan) -> None:
    """A parameter that one place uses on a rank's part and another on the whole has no one way to be summed."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    partial = set(partial_parameters(module, plan))
    for same in names.values():
        if partial & set(same) and not partial.issuperset(same):
            raise ValueError(
                f"tp: {' and '.join(same)} are one parameter, which is used on each rank's part of an activation in "
                "one place and on the whole in another; untie them, or leave sequence_parallel off"
            )


def find_sequence_blocks(module: nn.Module, plan: TensorPlan, blocks: dict[str, nn.Module]) -> SequenceBlocks:
    """The stacks among a network's blocks: neighbours in one container, each with layers that the plan divides.

    Raises:
        ValueError: there is none, or one that works across positions, as far as its layers tell.
    """
    by_container: dict[str, list[str]] = {}
    for name in blocks:
        by_container.setdefault(name.rpartition(".")[0], []).append(name)
    stacks: SequenceBlocks = []
    for container, names in by_container.items():
        held = [join_names(container, leaf) for leaf, _ in module.get_submodule(container).named_children()]
        is_stack = isinstance(module.get_submodule(container), CONTAINERS) and held == names
        if is_stack and all(_has_parts(name, plan) for name in names):
            stacks.append(names)
    for name in (name for names in stacks for name in names):
        _validate_dims(module, name, plan)
    if not stacks:
        raise ValueError(
            "sequence_parallel divides positions between blocks that follow each other in one list, each with layers "
            f"that tp divides; {type(module).__name__} has none. Leave it off, or name the blocks in shard_units="
        )
    return stacks


def _has_parts(block: str, plan: TensorPlan) -> bool:
    if block in plan:
        return bool(plan[block].columns)
    return any(name.startswith(f"{block}.") and part.copies_inputs for name, part in plan.items())


def _validate_dims(module: nn.Module, block: str, plan: TensorPlan) -> None:
    """Divided layers that read something else than the features of a position, and norms over positions."""
    norm = next((n for n, child in module.get_submodule(block).named_modules() if isinstance(child, NormBase)), None)
    if norm is not None:
        _refuse(f"{block}.{norm}", "takes statistics over the positions that would be divided")
    widths = set()
    for name, part in plan.items():
        if not f"{name}.".startswith(f"{block}."):
            continue
        if part.applied_row or "Window" in class_name(module.get_submodule(name)):
            _refuse(name, "attends within windows of an image, across what would be divided")
        if (part.copies_inputs or part.columns) and not part.multihead:
            first = next(iter(part.parameters)).rpartition(".")[0]
            widths.add(layers.inputs(module.get_submodule(f"{name}.{first}".strip("."))))
    if len(widths) > 1:
        _refuse(block, f"has layers over inputs of {' and '.join(map(str, sorted(widths)))}: not all are features")


def _refuse(name: str, why: str) -> None:
    raise ValueError(f"sequence_parallel: {name} {why}; leave it off for this network")
