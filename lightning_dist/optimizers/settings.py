"""What sharded parameters ask of torch's optimizers."""

from __future__ import annotations

from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Optimizer

from lightning_dist.placeholder import held


def choose_kernels(optimizer: Optimizer) -> None:
    """Chooses how an optimizer of torch steps over parameters of which some are sharded, where the user did not.

    A step by the horizontal (``foreach``) kernels passes DTensor's dispatch once per operation instead of once per
    operation and parameter: for AdamW over 40 parameters a sixth of the time, with the same numbers. torch chooses it
    by itself for plain tensors on accelerators only. Its price is temporary memory of the size of this rank's shards.
    ``foreach`` and ``fused`` raise on plain and sharded parameters in one group, or on several meshes (seen in 2.14):
    there they are off.

    Args:
        optimizer: changed in place; any other than torch's own keeps its settings.
    """
    for group in optimizer.param_groups:
        meshes = {p.device_mesh if isinstance(p, DTensor) else None for p in held(group["params"])}
        if len(meshes) > 1:
            group.update({name: False for name in ("foreach", "fused") if name in group})
        elif None not in meshes and _leaves_foreach_open(optimizer, group):
            group["foreach"] = True


def reads_the_loss(optimizer: Optimizer) -> bool:
    """Whether a step depends on the loss that its closure returns, so that ranks have to return the same one."""
    return isinstance(optimizer, LBFGS)


def _leaves_foreach_open(optimizer: Optimizer, group: dict[str, object]) -> bool:
    is_torchs = type(optimizer).step.__module__.startswith("torch.optim.")
    is_open = "foreach" in group and group["foreach"] is None
    return is_torchs and is_open and not group.get("fused") and not group.get("differentiable")
