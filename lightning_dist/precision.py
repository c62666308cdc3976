"""Lightning's precision names on the axes: what is gathered, computed and reduced in which dtype."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.precision import MixedPrecision as FabricMixedPrecision
from lightning.fabric.plugins.precision import Precision
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.amp import GradScaler
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer

from lightning_dist.gradients import local

SUPPORTED = ("32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed")


def shard_policy(precision: Precision) -> MixedPrecisionPolicy:
    """The dtypes of a fully sharded unit under a precision plugin, the Trainer's or Fabric's.

    Mixed precision gathers parameters in 16 bits, half the bytes of float32, and reduces gradients in float32. The
    computation stays under the plugin's autocast: it runs what needs float32 in float32, as in one process, and takes
    inputs of any dtype, so that no module has to be changed. The one difference from one process: parameters of ops
    that autocast runs in float32 (norms) are rounded to 16 bits first.

    The true precisions leave dtypes alone: the plugin converted the module.
    """
    if isinstance(precision, (MixedPrecision, FabricMixedPrecision)):
        dtype = torch.bfloat16 if precision.precision == "bf16-mixed" else torch.float16
        return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    return MixedPrecisionPolicy(cast_forward_inputs=False)


class AgreeingGradScaler(GradScaler):
    """A gradient scaler by which all ranks skip a step together when any of them holds a non-finite gradient.

    Under sharding a rank sees only its part of the gradients; torch's scaler would let the others step.

    Communication: one all-reduce of one float over the world for each call of ``unscale_``.
    """

    @classmethod
    def like(cls, scaler: GradScaler) -> AgreeingGradScaler:
        """A scaler with the settings of another that has not run yet."""
        return cls(
            device=scaler._device,
            init_scale=scaler._init_scale,
            growth_factor=scaler.get_growth_factor(),
            backoff_factor=scaler.get_backoff_factor(),
            growth_interval=scaler.get_growth_interval(),
            enabled=scaler.is_enabled(),
        )

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        # torch's own loop works on plain tensors: show it what this rank holds (seen in torch 2.14 and 2.15)
        shards = [local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if any(shard.dtype == torch.float16 for shard in shards) and not allow_fp16:
            raise ValueError("Attempting to unscale FP16 gradients.")
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for shard in shards:
            if shard.numel():
                by_kind.setdefault((shard.device, shard.dtype), []).append(shard)
        verdict = found_inf.clone()
        for (device, _), tensors in by_kind.items():
            found = torch.zeros_like(verdict, device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, inv_scale.to(device))
            verdict = torch.maximum(verdict, found.to(verdict.device))
        if dist.is_initialized():
            dist.all_reduce(verdict, dist.ReduceOp.MAX)
        return {verdict.device: verdict}


def make_agreeing(precision: Precision) -> None:
    """Replaces the plugin's gradient scaler, if it has torch's own, by one that all ranks agree through."""
    scaler: Any = getattr(precision, "scaler", None)
    if type(scaler) is GradScaler or (scaler is not None and type(scaler).__module__.startswith("torch.cuda")):
        precision.scaler = AgreeingGradScaler.like(scaler)  # type: ignore[attr-defined]
