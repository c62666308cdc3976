"""Private names of transformers and other model libraries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_dist.compat.names import uses


@uses("transformers.PreTrainedModel._no_split_modules")
def block_classes(module: nn.Module) -> tuple[str, ...]:
    """Names of the classes of a model's blocks, as the model declares them; none where it doesn't."""
    return tuple(getattr(module, "_no_split_modules", None) or ())


@uses("transformers.PreTrainedModel._tp_plan")
def declared_tensor_plan(module: nn.Module) -> Mapping[str, Any]:
    """The style of each layer under tensor parallelism, by pattern of names, as a model declares it; or nothing."""
    declared = getattr(module, "_tp_plan", None)
    return declared if isinstance(declared, Mapping) else {}
