"""From what a user asks of the tensor axis to the sharding plan of a module."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from lightning_dist.plans.tensor.general import general_plan
from lightning_dist.plans.tensor.plan import TensorPlan
from lightning_dist.plans.tensor.sequence import find_sequence_blocks
from lightning_dist.plans.tensor.sharding_plan import ShardingPlan, partial_parameters
from lightning_dist.plans.tensor.styles import Styles, declared_plan, styled_plan
from lightning_dist.plans.tensor.vocabulary import vocabulary_plan


@dataclass(frozen=True)
class TensorOptions:
    """What a user asks of the tensor axis; see :class:`~lightning_dist.HybridStrategy`."""

    styles: Styles | None = None
    sequence_parallel: bool = False
    loss_parallel: bool = False

    def sharding_plan(self, module: nn.Module, tp: int, blocks: dict[str, nn.Module]) -> ShardingPlan | None:
        """The plan of a module over ``tp`` ranks; None for one.

        Args:
            module: the whole module.
            tp: degree of the axis.
            blocks: its repeated parts, by name.

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

    Args:
        module: the whole module.
        styles: the user's, see :func:`~lightning_dist.plans.tensor.styles.styled_plan`.

    Raises:
        ValueError: nothing in it can be divided, or the user's plan does not fit it.
    """
    if styles is not None:
        return styled_plan(module, styles)
    plan = general_plan(module)
    for name, part in declared_plan(module).items():
        if not any(name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in plan):
            plan[name] = part
    plan |= vocabulary_plan(module, plan)
    if not plan:
        kinds = sorted(
            {type(child).__name__ for child in module.modules() if next(child.parameters(False), None) is not None}
        )
        raise ValueError(
            "tp finds nothing to divide: no attention and no feed-forward pair of dense layers among "
            f"{', '.join(kinds[:8]) or 'its layers'}. Convolutional networks have no tensor plan: use dp_shard, which "
            "divides any network's states; or name layers in tensor_plan="
        )
    return plan


def check(plan: TensorPlan, tp: int) -> None:
    """Raises if the axis does not divide what it has to.

    Raises:
        ValueError: with the degrees that would do.
    """
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
