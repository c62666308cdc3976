"""Which parts of a network the tensor axis divides: the user's plan, the model's own, or the general rule."""

from __future__ import annotations

import math

from torch import nn

from lightning_dist.plans.tensor.general import general_plan
from lightning_dist.plans.tensor.plan import Part, Split, TensorPlan
from lightning_dist.plans.tensor.styles import Styles, declared_plan, styled_plan
from lightning_dist.plans.tensor.vocabulary import vocabulary_plan

__all__ = ["Part", "Split", "Styles", "TensorPlan", "check", "find_tensor_plan", "partial_parameters"]


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


def partial_parameters(plan: TensorPlan) -> list[str]:
    """Names of the replicated parameters whose gradient each rank has only its part of."""
    return [f"{name}.{below}".strip(".") for name, part in plan.items() for below in part.partial]
