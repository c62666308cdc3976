"""Which parts of a network the tensor axis divides: the user's plan, the model's own, or the general rule."""

from lightning_dist.plans.tensor.options import TensorOptions, check, find_tensor_plan
from lightning_dist.plans.tensor.plan import (
    OWN_ARGUMENTS,
    ModulePlan,
    ShardingPlan,
    Split,
    TensorPlan,
    parameter_splits,
    partial_parameters,
)
from lightning_dist.plans.tensor.styles import Styles

__all__ = ["OWN_ARGUMENTS", "ModulePlan", "ShardingPlan", "Split", "Styles", "TensorOptions", "TensorPlan", "check"]
__all__ += ["find_tensor_plan", "parameter_splits", "partial_parameters"]
