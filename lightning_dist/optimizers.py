"""What sharded parameters ask of torch's optimizers."""

from __future__ import annotations

from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Adafactor, Optimizer, Rprop

from lightning_dist.placeholder import held, is_placeholder

UNSHARDABLE = (Adafactor, Rprop)
"""Steps that torch can't take on sharded parameters (seen in 2.14 and 2.15)."""


def settle(optimizer: Optimizer) -> None:
    """Chooses how an optimizer of torch steps over parameters of which some are sharded, where the user did not.

    A step by the horizontal (``foreach``) kernels passes DTensor's dispatch once per operation instead of once per
    operation and parameter: for AdamW over 40 parameters a sixth of the time, with the same numbers. torch chooses it
    by itself for plain tensors on accelerators only. Its price is temporary memory of the size of this rank's shards.
    ``foreach`` and ``fused`` raise on plain and sharded parameters in one group, or on several meshes (seen in 2.14):
    there they are off.

    Args:
        optimizer: changed in place; any other than torch's own keeps its settings.

    Raises:
        ValueError: the optimizer can't step over sharded parameters.
    """
    if isinstance(optimizer, LBFGS) and any(is_placeholder(p) for g in optimizer.param_groups for p in g["params"]):
        raise ValueError(
            "LBFGS works on all parameters as one vector, and under pp a rank holds those of its stages; use another "
            "optimizer, or another axis"
        )
    sharded = any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    if sharded and isinstance(optimizer, UNSHARDABLE):
        raise ValueError(
            f"torch's {type(optimizer).__name__} can't step over parameters that dp_shard or tp split; use "
            "dp_replicate, or an optimizer that works element by element, such as AdamW"
        )
    for group in optimizer.param_groups:
        meshes = {p.device_mesh if isinstance(p, DTensor) else None for p in held(group["params"])}
        if len(meshes) > 1:
            group.update({name: False for name in ("foreach", "fused") if name in group})
        elif None not in meshes and _leaves_foreach_open(optimizer, group):
            group["foreach"] = True


def _leaves_foreach_open(optimizer: Optimizer, group: dict[str, object]) -> bool:
    is_torchs = type(optimizer).step.__module__.startswith("torch.optim.")
    is_open = "foreach" in group and group["foreach"] is None
    return is_torchs and is_open and not group.get("fused") and not group.get("differentiable")
