"""A region: a module whose own forward runs on this rank's part of its parameters.

[Note: regions]
A split parameter is a DTensor on the tensor axis, with the plain model's name and shape; activations are plain
tensors. While a region's forward runs, the module's ``__dict__`` shadows its parameters by their local parts, and its
numbers (of heads, of features) by those of this rank; so the code of the model need not know. The shadows are gone
when it ends, also by an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from lightning_dist.parallel.tensor.collectives import enter, leave
from lightning_dist.parallel.tensor.randomness import own_stream, shared_again
from lightning_dist.parallel.tensor.shards import local_part

_MISSING = object()
_ATTRIBUTE = "_tensor_region"


@dataclass
class Region:
    """What a module's forward needs so that it runs on this rank's part.

    Args:
        mesh: of the tensor axis.
        local: names of parameters (of the module, or dotted, of one below it) that it sees as their local part.
        after: name of the parameter that is added once the sum over the axis is there: the bias of a row-wise layer.
        attributes: numbers by dotted name that it sees instead of its own.
        buffers: placements of buffers, by dotted name, of which it sees its part.
        enters: its activations are replicated, and each rank's part uses them.
        stays: names of arguments that are this rank's own already.
        leaves: its output is a partial sum.
        mode: makes a context for the module's forward to run in.
        draws: random numbers inside, until a region that leaves, belong to this rank's part: dropout between heads.
        finish: what its output, this rank's part, goes through.

    Communication: see :func:`~lightning_dist.parallel.tensor.collectives.enter` and ``leave``.
    """

    mesh: DeviceMesh
    local: list[str] = field(default_factory=list)
    after: str | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    buffers: dict[str, Placement] = field(default_factory=dict)
    enters: bool = False
    stays: frozenset[str] = frozenset()
    leaves: bool = False
    mode: Callable[[nn.Module], AbstractContextManager[Any]] | None = None
    draws: bool = False
    finish: Callable[[Any], Any] | None = None

    def attach(self, module: nn.Module) -> None:
        """Makes the module a region."""
        vars(module)[_ATTRIBUTE] = self
        # a bound method on the instance: deepcopy binds it anew, and the hooks of the module stay outside of it
        vars(module)["forward"] = MethodType(_forward, module)

    @staticmethod
    def of(module: nn.Module) -> Region | None:
        """The region that a module is, if it is one."""
        return vars(module).get(_ATTRIBUTE)

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's own forward, on this rank's part."""
        if self.enters:
            args, kwargs = self._enter(args, kwargs)
        draws = own_stream(self.mesh) if self.draws and module.training else nullcontext()
        with self._shadowed(module), draws, nullcontext() if self.mode is None else self.mode(module):
            output = type(module).forward(module, *args, **kwargs)
        if self.finish is not None:
            output = self.finish(output)
        if self.leaves:
            shared_again()
            output = leave(output, self.mesh)
            bias = None if self.after is None else module._parameters[self.after]
            if bias is not None:
                output = output + bias.to(output.dtype)
        return output

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        entered: dict[int, tuple[Any, Any]] = {}

        def once(value: Any) -> Any:
            if not (isinstance(value, Tensor) and value.requires_grad and value.ndim > 1):
                return value
            if id(value) not in entered:  # the same object stays the same: modules ask whether query is key
                entered[id(value)] = (enter(value, self.mesh), value)
            return entered[id(value)][0]

        return tuple(once(a) for a in args), {k: v if k in self.stays else once(v) for k, v in kwargs.items()}

    @contextmanager
    def _shadowed(self, module: nn.Module) -> Iterator[None]:
        shadowed: list[tuple[dict[str, Any], str, Any]] = []

        def shadow(name: str, value: Any) -> None:
            owner, _, leaf = name.rpartition(".")
            own = vars(module.get_submodule(owner))
            shadowed.append((own, leaf, own.get(leaf, _MISSING)))
            own[leaf] = value

        try:
            for name in self.local:
                parameter = _parameter(module, name)
                if isinstance(parameter, DTensor):
                    shadow(name, parameter.to_local())
            if self.after is not None and module._parameters[self.after] is not None:
                shadow(self.after, _no_bias(module, self.after))
            for name, value in self.attributes.items():
                shadow(name, value)
            for name, place in self.buffers.items():
                shadow(name, local_part(module.get_buffer(name), place, self.mesh))
            yield
        finally:
            for own, leaf, before in reversed(shadowed):
                if before is _MISSING:
                    del own[leaf]
                else:
                    own[leaf] = before


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return vars(self)[_ATTRIBUTE].run(self, args, kwargs)


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    owner, _, leaf = name.rpartition(".")
    return module.get_submodule(owner)._parameters.get(leaf)


def _no_bias(module: nn.Module, name: str) -> Tensor | None:
    """nn.Linear takes None; others, such as transformers' Conv1D, add what they find."""
    bias = module._parameters[name]
    assert bias is not None
    return None if isinstance(module, nn.Linear) else torch.zeros_like(bias)
