"""Bad numbers: samples that make a loss large or no number, and gradients that one rank gets wrong; seeded."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, TensorDataset

from lightning_dist.compat.distributed import gathered_of, param_groups_of
from lightning_dist.placeholder import is_placeholder


def poisoned(data: Dataset, factors: Mapping[int, float]) -> TensorDataset:
    """The data with the points of some samples multiplied: by nan, or by a large number, for a spike of the loss."""
    x, *others = (tensor.clone() for tensor in data.tensors)  # type: ignore[attr-defined]
    for index, factor in factors.items():
        x[index] *= factor
    return TensorDataset(x, *others)


@dataclass
class GradientFault(L.Callback):
    """One rank gets one element of a gradient wrong, once.

    Args:
        rank: in the world.
        step: of the optimizer, counted from 0; its first computation.
        kind: ``"flip"`` a bit; ``"inf"`` or ``"nan"`` in place of the element.
        where: ``"local"``, before gradients are reduced over the ranks, or ``"finished"``, after; ``"parameter"``, in a
            parameter that is not divided.
        seed: of the parameter, the element and the bit.
    """

    rank: int
    step: int
    kind: Literal["flip", "inf", "nan"]
    where: Literal["local", "finished", "parameter"] = "finished"
    seed: int = 0
    num_done: int = 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        here = dist.get_rank() if dist.is_initialized() else 0
        if here != self.rank or trainer.global_step != self.step or self.num_done:
            return
        runner: Any = trainer.strategy.parts.module_setup.runner  # type: ignore[attr-defined]
        draws = random.Random(self.seed)
        with torch._C.DisableTorchFunctionSubclass():
            held = [p for p in pl_module.parameters() if not is_placeholder(p) and p.requires_grad]
            if self.where == "local":
                leaf = draws.choice(_leaves(pl_module, held))
                leaf.register_hook(partial(self._in_hook, draws))
            elif self.where == "parameter":
                self._spoil(draws, draws.choice([p for p in held if not isinstance(p, DTensor)]))
            else:
                self._after(runner, partial(self._in_finished, draws, held))

    def _after(self, runner: Any, spoil: Any) -> None:
        original = runner.after_backward

        def after_backward() -> None:
            original()
            spoil()
            del runner.after_backward

        runner.after_backward = after_backward

    def _in_hook(self, draws: random.Random, gradient: Tensor) -> Tensor | None:
        if self.num_done:
            return None
        gradient = gradient.clone()
        self._spoil(draws, gradient)
        return gradient

    def _in_finished(self, draws: random.Random, held: list[Any]) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            filled = [p.grad for p in held if p.grad is not None and _local(p.grad).numel()]
            self._spoil(draws, draws.choice(filled))

    def _spoil(self, draws: random.Random, gradient: Tensor) -> None:
        local = _local(gradient)
        index = draws.randrange(local.numel())
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), local.shape))
        if self.kind == "flip":
            bits = local.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()])
            bits[place] = int(bits[place]) ^ (1 << draws.randrange(8 * local.element_size() - 1))
        else:
            local[place] = float(self.kind)
        self.num_done += 1


def _local(tensor: Any) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


def _leaves(module: L.LightningModule, held: list[Any]) -> list[Tensor]:
    """Those of autograd: what fully_shard gathers stands for what it divides."""
    units: list[Any] = [unit for unit in module.modules() if hasattr(unit, "set_requires_gradient_sync")]
    gathered = {id(p.sharded_param): gathered_of(p) for u in units for g in param_groups_of(u) for p in g.fsdp_params}
    return [leaf for p in held if (leaf := gathered.get(id(p), p)) is not None]
