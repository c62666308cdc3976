"""Lightning's precision names on the axes: what is gathered, computed and reduced in which dtype."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.precision import MixedPrecision as FabricMixedPrecision
from lightning.fabric.plugins.precision import Precision
from lightning.pytorch.plugins import precision as plugins
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dist.compat.torch import UnscalingGradScaler
from lightning_dist.gradients import local_gradients
from lightning_dist.patches import Patches

SUPPORTED = ("32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed")


def shard_policy(precision: Precision, device: torch.device) -> MixedPrecisionPolicy:
    """The dtypes of a fully sharded unit under a precision plugin, the Trainer's or Fabric's.

    Mixed precision gathers in 16 bits, half the bytes of float32, the parameters that autocast would round at once, see
    :func:`cast_by_autocast`, and reduces gradients in float32. The computation stays under the plugin's autocast: it
    runs what needs float32 in float32, as in one process, and takes inputs of any dtype. The true precisions leave
    dtypes alone: the plugin converted the module. So does autocast for another device.
    """
    if isinstance(precision, (plugins.MixedPrecision, FabricMixedPrecision)) and precision.device == device.type:
        dtype = torch.bfloat16 if precision.precision == "bf16-mixed" else torch.float16
        return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    return MixedPrecisionPolicy(cast_forward_inputs=False)


def rounds_products(device_type: str) -> bool:
    """Whether products of float32 are computed in less, under autocast or by the user's settings."""
    if torch.is_autocast_enabled(device_type):
        return True
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # it was set for a backend, by fp32_precision
        return True


def cast_by_autocast(module: nn.Module) -> set[nn.Parameter]:
    """The parameters that autocast casts to 16 bits wherever they are used: of dense layers and convolutions.

    The others (of norms, embeddings, recurrent layers, and what a module uses itself) are computed with in float32 in
    one process, or cast by an operation of it. Norms on the CPU take no weights of 16 bits beside inputs of 32. One
    that is shared with a module of another kind, an embedding say, is among the others.
    """
    cast: set[nn.Parameter] = set()
    others: set[nn.Parameter] = set()
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            (cast if _casts(layer, name) else others).add(parameter)
    return cast - others


def _casts(layer: nn.Module, name: str) -> bool:
    if isinstance(layer, nn.MultiheadAttention):
        return name.startswith(("in_proj_", "q_proj_", "k_proj_", "v_proj_"))
    forward = type(layer).forward
    if type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers."):  # GPT-2's dense layer
        return True
    return any(isinstance(layer, kind) and forward is kind.forward for kind in _CASTING)


_TRANSPOSED: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CASTING: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


class AgreeingGradScaler(UnscalingGradScaler):
    """A gradient scaler by which all ranks skip a step together when any of them holds a non-finite gradient.

    Under sharding a rank sees only its part of the gradients; torch's scaler would let the others step. Communication:
    one all-reduce of one float over the world for each call of ``unscale_``.
    """

    @override
    def unscale_gradients(self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> Tensor:
        shards = local_gradients(p for group in optimizer.param_groups for p in group["params"])
        if any(shard.dtype == torch.float16 for shard in shards) and not allow_fp16:
            raise ValueError("Attempting to unscale FP16 gradients.")
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for shard in shards:
            if shard.numel():
                by_kind.setdefault((shard.device, shard.dtype), []).append(shard)
        verdict = found_inf.clone()
        for (device, _), tensors in by_kind.items():
            found = torch.zeros_like(verdict, device=device)
            self.unscale_tensors(tensors, found, inv_scale.to(device))
            verdict = torch.maximum(verdict, found.to(verdict.device))
        if dist.is_initialized():
            dist.all_reduce(verdict, dist.ReduceOp.MAX)
        return verdict


def make_agreeing(precision: Precision, patches: Patches) -> None:
    """Makes the plugin's gradient scaler, torch's own or a subclass of it, one by which all ranks agree."""
    scaler: Any = getattr(precision, "scaler", None)
    if isinstance(scaler, GradScaler) and not isinstance(scaler, AgreeingGradScaler):
        patches.also(partial(setattr, scaler, "__class__", type(scaler)))
        scaler.__class__ = type(type(scaler).__name__, (AgreeingGradScaler, type(scaler)), {})


def validate_precision(precision: Precision, world_size: int) -> None:
    """Raises a ValueError for a plugin of another strategy, or one that ranks are not tried with, or can't agree by."""
    name = type(precision).__name__
    asked: Any = getattr(precision, "precision", None)
    does = f"Trainer(precision={asked if asked in SUPPORTED else 'bf16-mixed'!r})"
    for kind, strategy in _OF_OTHERS.items():
        if isinstance(precision, kind):
            raise ValueError(f"{name} works with Lightning's {strategy} only; pass {does} in its place")
    if isinstance(precision, _ALONE) and world_size > 1:
        raise ValueError(
            f"{name} puts layers with weights of its own kind in the place of dense ones, which strategy 'hybrid' "
            f"neither divides nor copies over {world_size} ranks; use {does}, or strategy='ddp'"
        )
    scaler: Any = getattr(precision, "scaler", None)
    if scaler is not None and not isinstance(scaler, GradScaler) and world_size > 1:
        raise ValueError(
            f"the scaler of {name} is a {type(scaler).__name__} and no torch.amp.GradScaler: ranks could not agree by "
            "it which steps to skip; pass a GradScaler, or a subclass of it"
        )


_OF_OTHERS = {
    plugins.DeepSpeedPrecision: "DeepSpeedStrategy",
    plugins.FSDPPrecision: "FSDPStrategy",
    plugins.XLAPrecision: "XLAStrategy",
}
_ALONE = plugins.BitsandbytesPrecision, plugins.TransformerEnginePrecision
