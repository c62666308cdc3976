"""Where the tensors of a module lie: what goes to a rank's device at once, and what waits on the host to be divided."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from lightning_dist.compat.lightning import set_device
from lightning_dist.placeholder import is_placeholder


def to_device(module: nn.Module, device: torch.device) -> None:
    """Moves what is real and whole: what is deferred is materialised there later, and what is divided is there.

    Communication: none. Memory of the device: all that is moved.
    """
    if not any(map(_stays, _tensors(module))):
        module.to(device)
        return
    set_device(module, device=device)
    for child in module.modules():
        own = [*child.parameters(recurse=False), *child.buffers(recurse=False)]
        if not any(map(_stays, _tensors(child))):
            child.to(device)  # also what is neither parameter nor buffer, as the states of a metric
        else:
            for tensor in own:
                if not _stays(tensor) and tensor.device != device:
                    tensor.data = tensor.data.to(device)


def all_but_parameters_to_device(module: nn.Module, device: torch.device) -> None:
    """As ``module.to(device)``, with the user's and the metrics' own ways of it, but parameters stay where they are.

    A module that was built in ``__init__`` is so never whole on the device: parameters go there unit by unit when they
    are sharded, part by part when the tensor axis divides them, and those of a stage when the network has been cut.
    """
    with _ParametersStay(module):
        module.to(device)


class _ParametersStay(TorchFunctionMode):
    """Parameters, their gradients, and what is deferred are not moved."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._staying = {id(t) for p in module.parameters() for t in (p, p.grad) if t is not None}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.to, Tensor.cuda) and (id(args[0]) in self._staying or args[0].is_meta):
            return args[0]
        return func(*args, **(kwargs or {}))


def _stays(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) or is_placeholder(tensor) or tensor.is_meta


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
