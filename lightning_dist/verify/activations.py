"""What modules return in one step, and the gradients that reach what they are given and return, as this rank sees them.

[Note: a rank's share of an activation]
A rank has the samples of its data rank, under ``pp`` a microbatch at a time and of its own stages only, and under
``tp`` perhaps its part of the columns, heads or positions. All of it is left as it is, with nothing communicated;
:mod:`~lightning_dist.verify.departure` puts the shares together. Hooks see only what a step computes for its gradients:
what runs without (an average of weights, the rehearsals of ``tp`` and ``pp``) is left out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_dist.compat.distributed import local_tensor
from lightning_dist.compat.torch import DisableTorchFunctionSubclass, FakeTensor
from lightning_dist.parallel.rehearsal import FixedNumbers
from lightning_dist.pytree import deep_tensors

Side = Literal["output", "input"]
Place = tuple[str, Side, int]
"""The module's name, and which of the tensors that it returned or was given."""


@dataclass
class Activations:
    """Of one step, on one rank.

    Args:
        kinds: classes of modules by name.
        outputs: what each call of a module returned, by the place, in the order of calls.
        inputs: what it was given, likewise.
        gradients: what reached each, likewise.
        outputs_in_order, gradients_in_order: places and numbers of calls, as they came.
    """

    kinds: dict[str, str] = field(default_factory=dict)
    outputs: dict[Place, dict[int, Tensor]] = field(default_factory=dict)
    inputs: dict[Place, dict[int, Tensor]] = field(default_factory=dict)
    gradients: dict[Place, dict[int, Tensor]] = field(default_factory=dict)
    outputs_in_order: list[tuple[Place, int]] = field(default_factory=list)
    gradients_in_order: list[tuple[Place, int]] = field(default_factory=list)


class ActivationRecorder(Callback):
    """Records one step.

    Args:
        batch: the number of the batch, from 0.
    """

    def __init__(self, batch: int) -> None:
        self._batch, self._number = batch, -1
        self.recorded = Activations()
        self._calls, self._given = Counter[str](), Counter[str]()
        self._handles: list[Any] = []

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._number += 1
        if self._number != self._batch:
            return
        inside = {id(child) for m in pl_module.modules() if isinstance(m, Metric) for child in m.modules()}
        for name, child in pl_module.named_modules():
            if name and id(child) not in inside:
                self.recorded.kinds[name] = type(child).__name__
                before, after = partial(self._before, name), partial(self._after, name)
                self._handles.append(child.register_forward_pre_hook(before, with_kwargs=True))
                self._handles.append(child.register_forward_hook(after))

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if _is_real(given := deep_tensors((args, kwargs))):
            for index, tensor in enumerate(given):
                if not isinstance(tensor, nn.Parameter):
                    self.recorded.inputs.setdefault((name, "input", index), {})[self._given[name]] = _kept(tensor)
                if not tensor.is_leaf:
                    self._watch((name, "input", index), self._given[name], tensor)
            self._given[name] += 1

    def _after(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if _is_real(returned := deep_tensors(output)):
            call = self._calls[name]
            self._calls[name] += 1
            for index, tensor in enumerate(returned):
                place: Place = (name, "output", index)
                self.recorded.outputs.setdefault(place, {})[call] = _kept(tensor)
                self.recorded.outputs_in_order.append((place, call))
                self._watch(place, call, tensor)

    def _watch(self, place: Place, call: int, tensor: Tensor) -> None:
        if tensor.requires_grad:
            tensor.register_hook(partial(self._note, place, call))

    def _note(self, place: Place, call: int, gradient: Tensor) -> None:
        if FixedNumbers.running or isinstance(gradient, FakeTensor):
            return
        calls = self.recorded.gradients.setdefault(place, {})
        if call not in calls:
            self.recorded.gradients_in_order.append((place, call))
        calls[call] = _kept(gradient)


def _is_real(tensors: list[Tensor]) -> bool:
    fakes = any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in tensors)
    return torch.is_grad_enabled() and not FixedNumbers.running and not fakes


@torch.no_grad()
def _kept(tensor: Tensor) -> Tensor:
    with DisableTorchFunctionSubclass():
        part = local_tensor(tensor) if isinstance(tensor, DTensor) else tensor
        return part.detach().as_subclass(Tensor).to("cpu", copy=True)
