"""Whole copies of a module that callbacks made before it was divided: averages of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from lightning_dist.compat.torch import own_parameters
from lightning_dist.divided.tensor import as_divided
from lightning_dist.dtensors import as_dtensor, part_of


def divide_copies(owners: Iterable[Any], module: nn.Module) -> None:
    """Divides copies of a module as the module itself is: each rank keeps its part of them. Communication: none.

    Lightning's ``WeightAveraging`` and ``StochasticWeightAveraging`` copy the module in their ``setup``, which comes
    before the strategy's. Element by element an average then works on this rank's part.

    Args:
        owners: the callbacks; any module among their attributes whose parameters are those of ``module``, in name and
            shape, is a copy.
        module: divided.
    """
    for copied in copies_of(module, owners):
        _divide(copied, module)


def copies_of(module: nn.Module, owners: Iterable[Any]) -> Iterator[nn.Module]:
    """The copies of a module, or of what it averages over, that its callbacks keep; see :func:`divide_copies`."""
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    for value in [value for owner in owners for value in vars(owner).values()]:
        copied = value.module if isinstance(value, AveragedModel) else value
        if not isinstance(copied, nn.Module) or copied is module:
            continue
        if {name: parameter.shape for name, parameter in copied.named_parameters()} == shapes:
            yield copied


def _divide(copied: nn.Module, module: nn.Module) -> None:
    likes = dict(module.named_parameters(remove_duplicate=False))
    divided: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, child in copied.named_modules():
        for name, parameter in own_parameters(child).items():
            like = likes.get(f"{prefix}.{name}" if prefix else name)
            if parameter is None or not isinstance(like, DTensor) or isinstance(parameter, DTensor):
                continue
            if parameter not in divided:  # tied ones stay one
                part = nn.Parameter(as_dtensor(part_of(parameter, like), like), requires_grad=parameter.requires_grad)
                divided[parameter] = as_divided(part)
            own_parameters(child)[name] = divided[parameter]
