"""A region: a module whose own forward runs on this rank's part of its parameters.

[Note: regions]
A split parameter is a DTensor on the tensor axis, with the plain model's name and shape; activations are plain
tensors. While a region's forward runs, the module's ``__dict__`` shadows its parameters by their local parts, and its
numbers (of heads, of features) by those of this rank; so the code of the model need not know. The shadows are gone
when it ends, also by an exception.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from lightning_dist.parallel.tensor.collectives import enter, gather, leave
from lightning_dist.parallel.tensor.own_part import marked, unmarked
from lightning_dist.parallel.tensor.partial import seen_in_part
from lightning_dist.parallel.tensor.shadows import shadowed
from lightning_dist.parallel.tensor.shards import local_part, on_axis
from lightning_dist.pytree import tree_map
from lightning_dist.random_states import own_stream, shared_again

if TYPE_CHECKING:
    from lightning_dist.parallel.tensor.hooks import HooksInside
    from lightning_dist.parallel.tensor.positions import Positions
    from lightning_dist.parallel.tensor.proof import Proof

_ATTRIBUTE = "_tensor_region"


@dataclass
class Region:
    """What a module's forward needs so that it runs on this rank's part.

    Args:
        mesh: of the tensor axis.
        local: names of parameters (of the module, or dotted, of one below it) that it sees as their local part.
        after: name of the parameter that is added once the sum over the axis is there: the bias of a row-wise layer.
        partial: names of replicated parameters that it uses on its part; see [Note: gradients of a part].
        attributes: numbers by dotted name that it sees instead of its own.
        buffers: placements of buffers, by dotted name, of which it sees its part.
        enters: its activations are replicated, and each rank's part uses them.
        stays: names of arguments that are this rank's own already.
        leaves: its output is a partial sum.
        width: of inputs that are not divided. A layer that leaves is given those where the code of a model calls it
            from elsewhere than the module whose part it is; it then runs whole. None for what always runs in part.
        mode: makes a context for the module's forward to run in.
        draws: random numbers inside, until a region that leaves, belong to this rank's part: dropout between heads.
        finish: what its output, this rank's part, goes through.
        hooks: shows users' hooks inside whole activations; None where there is nothing divided inside.
        proof: compares the first run of each kind of module with the whole one; None for what needs none.
        positions: of the chain of blocks that it lies in, under sequence parallel.
        names: of the forward's arguments that may be given by place; ``attach`` notes them.

    Communication: see :func:`~lightning_dist.parallel.tensor.collectives.enter` and ``leave``.
    """

    mesh: DeviceMesh
    local: list[str] = field(default_factory=list)
    after: str | None = None
    partial: list[str] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    buffers: dict[str, Placement] = field(default_factory=dict)
    enters: bool = False
    stays: frozenset[str] = frozenset()
    leaves: bool = False
    width: int | None = None
    mode: Callable[[nn.Module], AbstractContextManager[Any]] | None = None
    draws: bool = False
    finish: Callable[[Any], Any] | None = None
    hooks: HooksInside | None = None
    proof: Proof | None = None
    positions: Positions | None = None
    names: tuple[str, ...] = ()

    def attach(self, module: nn.Module) -> None:
        """Makes the module a region."""
        parameters = inspect.signature(type(module).forward).parameters.values()
        self.names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))[1:]
        vars(module)[_ATTRIBUTE] = self
        # a bound method on the instance: deepcopy binds it anew, and the hooks of the module stay outside of it
        vars(module)["forward"] = MethodType(_forward, module)

    @staticmethod
    def of(module: nn.Module) -> Region | None:
        """The region that a module is, if it is one."""
        return vars(module).get(_ATTRIBUTE)

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's own forward, on this rank's part."""
        if self.width is not None and args and args[0].shape[-1] == self.width:
            return type(module).forward(module, *args, **kwargs)  # with a weight that answers as the whole
        own = frozenset() if self.proof is None else self.proof.own_outputs.get(type(module), frozenset())
        if self.stays and any(self.proof.own_outputs.values() if self.proof is not None else ()):
            args, kwargs = unmarked((args, kwargs))
        if self.proof is not None and self.proof.is_due(module):
            self.proof.run(module, args, kwargs)
            own = self.proof.own_outputs.get(type(module), frozenset())
        with nullcontext() if self.hooks is None else self.hooks.seen_whole(module, self, args, kwargs):
            output = self._run(module, args, kwargs)
        return marked(output, own) if own else output

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.enters:
            args, kwargs = self._enter(args, kwargs)
        draws = own_stream(self.mesh) if self.draws and module.training else nullcontext()
        with self._shadowed(module), draws, nullcontext() if self.mode is None else self.mode(module):
            output = type(module).forward(module, *args, **kwargs)
        if self.finish is not None:
            output = self.finish(output)
        if self.leaves:
            shared_again()
            output = self.leave(output)
            bias = None if self.after is None else getattr(module, self.after)
            if bias is not None:
                output = output + bias.to(output.dtype)
        return output

    def leave(self, partial: Tensor, dim: int = 1) -> Tensor:
        """The sum over the axis of what the ranks' parts made; under sequence parallel this rank's positions of it.

        Args:
            partial: this rank's part.
            dim: of positions.
        """
        if self.positions is not None and self.positions.is_inside:
            return self.positions.leave(partial, dim)
        return leave(partial, self.mesh)

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        entered: dict[int, tuple[Any, Any]] = {}
        positions = self.positions if self.positions is not None and self.positions.is_inside else None

        def once(value: Any) -> Any:
            if not isinstance(value, Tensor) or not (value.requires_grad or positions is not None):
                return value
            if id(value) not in entered:  # the same object stays the same: modules ask whether query is key
                inner = enter(value, self.mesh) if positions is None else positions.enter(value)
                entered[id(value)] = (inner, value)
            return entered[id(value)][0]

        return self.rewrite(args, kwargs, lambda name, value: value if name in self.stays else tree_map(once, value))

    def rewrite(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[str, Any], Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, each changed by its name in the forward's signature and its value."""
        names = (*self.names, *("*" for _ in args[len(self.names) :]))
        changed = tuple(change(name, value) for name, value in zip(names, args, strict=False))
        return changed, {name: change(name, value) for name, value in kwargs.items()}

    def is_given_own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an argument is this rank's own, made by another part."""
        named = (*zip(self.names, args, strict=False), *kwargs.items())
        return any(name in self.stays and value is not None for name, value in named)

    def whole_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the whole module takes them; what another part made is (batch, heads, queries, keys).

        Communication: one all-gather of each of those.
        """

        def gathered(name: str, value: Any) -> Any:
            return gather(value, self.mesh, 1) if name in self.stays and isinstance(value, Tensor) else value

        return self.rewrite(args, kwargs, gathered)

    def whole_output(self, output: Tensor) -> Tensor:
        """The output as the whole module gives it."""
        return output

    def again(self) -> AbstractContextManager[Any]:
        """To be made in a forward, and entered, more than once too, while it is computed again in backward."""
        return nullcontext()

    def _partial_views(self, module: nn.Module) -> dict[str, Tensor]:
        """By name. A parameter that is tied, or that the module lacks by now, is seen once, or not at all."""
        if not torch.is_grad_enabled():
            return {}
        parameters = {name: _parameter(module, name) for name in self.partial}
        return {name: seen_in_part(p, self.mesh) for name, p in parameters.items() if p is not None and p.requires_grad}

    def _shadowed(self, module: nn.Module) -> AbstractContextManager[None]:
        values: dict[str, Any] = {}
        for name in self.local:
            parameter = _parameter(module, name)
            if parameter is None and name.rpartition(".")[2] == "weight":
                raise RuntimeError(
                    f"the {name} of a {type(module).__name__} was taken out of it (pruned, or parametrised) during the "
                    "fit, while tp divides it; do so before the fit, or leave the layer whole with tensor_plan="
                )
            if parameter is not None and not isinstance(parameter, DTensor):
                raise ValueError(
                    f"tp divides the {name} of a {type(module).__name__}, which is another, whole tensor now "
                    "(functional_call, or an assignment): write the values into the parameter, or leave the layer "
                    "whole with tensor_plan="
                )
            if isinstance(parameter, DTensor):
                values[name] = on_axis(parameter, "tp")  # of a copy of a module that dp_shard divides too, it gathers
        if self.after is not None and module._parameters[self.after] is not None:
            values[self.after] = _no_bias(module, self.after)
        values |= self._partial_views(module)
        values |= self.attributes
        for name, place in self.buffers.items():
            values[name] = local_part(module.get_buffer(name), place, self.mesh)
        return shadowed(module, values)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if is_whole():
        return type(self).forward(self, *args, **kwargs)
    return vars(self)[_ATTRIBUTE].run(self, args, kwargs)


_whole: list[nn.Module] = []
"""The modules that run whole."""


def is_whole() -> bool:
    """Whether regions run their modules' own forward on whole parameters, which somebody else put there."""
    return bool(_whole)


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """While it lasts, the module runs as the plain one. Communication: gathers what is divided in it, over the axis."""
    divided = {name: p for name, p in module.named_parameters() if isinstance(p, DTensor)}
    with shadowed(module, {name: p.full_tensor() for name, p in divided.items()}):
        _whole.append(module)
        try:
            yield
        finally:
            _whole.pop()


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    owner, _, leaf = name.rpartition(".")
    return module.get_submodule(owner)._parameters.get(leaf)


def _no_bias(module: nn.Module, name: str) -> Tensor | None:
    """nn.Linear takes None; others, such as transformers' Conv1D, add what they find."""
    bias = module._parameters[name]
    assert bias is not None
    return None if isinstance(module, nn.Linear) else torch.zeros_like(bias)
