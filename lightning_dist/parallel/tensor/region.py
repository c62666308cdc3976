"""A region: a module whose own forward runs on this rank's part of its parameters.

[Note: regions]
A split parameter is a DTensor on the tensor axis, with the plain model's name and shape; activations are plain
tensors. While a region's forward runs, the module's ``__dict__`` overrides its parameters by their local parts, and its
numbers (of heads, of features) by those of this rank; so the code of the model need not know. The overrides are gone
when it ends, also by an exception.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement

from lightning_dist.compat.distributed import is_fully_shards
from lightning_dist.compat.torch import DisableTorchFunctionSubclass, own_parameters
from lightning_dist.divided.functions import Way, way_of
from lightning_dist.parallel.tensor.draws import Drawn, Draws
from lightning_dist.parallel.tensor.head_count import HeadCount
from lightning_dist.parallel.tensor.mappings import (
    copy_to_tensor_region,
    gather,
    reduce_from_tensor_region,
    reduce_scatter_to_sequence_region,
    seen_in_part,
)
from lightning_dist.parallel.tensor.positions import DIM, Positions
from lightning_dist.parallel.tensor.shards import on_axis, shard_of
from lightning_dist.patches import Patches
from lightning_dist.pytree import tree_leaves, tree_map
from lightning_dist.random_states import own_stream, shared_again

_ATTRIBUTE = "lightning_dist_tensor_region"
_OWN = "lightning_dist_own"
_MISSING = object()
_OF_HEADS = ("bias", "mask", "alibi")
HEADS_DIM = -3
"""Of scores, and of what is added to them: (batch, heads, queries, keys)."""
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class FirstRunCheck(Protocol):
    """What a region asks of :class:`~lightning_dist.parallel.tensor.equivalence.EquivalenceCheck`."""

    own_outputs: dict[type, frozenset[int]]
    by_width: set[type]

    def before_run(self, module: nn.Module, region: Region, args: Args, kwargs: Kwargs) -> None: ...


class HooksAround(Protocol):
    """What a region asks of :class:`~lightning_dist.parallel.tensor.hooks.HooksInside`."""

    def seen_whole(
        self, module: nn.Module, region: Region, args: Args, kwargs: Kwargs
    ) -> AbstractContextManager[None]: ...


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
        copies_inputs: its activations are replicated, and each rank's part uses them.
        stays: names of arguments that are this rank's own already, where they have its number of heads.
        beside: names of arguments that are used beside its part, once its output is whole.
        heads: of all ranks; of arguments that have so many the module sees this rank's. 0 where it has none.
        reduces_output: its output is a partial sum.
        width: of inputs that are not divided. A row-wise layer is given those where the code of a model calls it
            from elsewhere than the module whose part it is; it then runs whole. None for what always runs in part.
        mode: makes a context for the module's forward to run in.
        draws: random numbers inside, until a row-wise layer, belong to this rank's part: dropout between heads. None
            where none are drawn.
        finish: what its output, this rank's part, goes through.
        hooks: shows users' hooks inside whole activations; None where there is nothing divided inside.
        check: compares the first run of each kind of module with the whole one; None for what needs none.
        positions: of the stack of blocks that it lies in, under sequence parallel.
        names: of the forward's arguments that may be given by place; ``attach`` notes them.

    Communication: see ``copy_to_tensor_region`` and ``reduce_from_tensor_region``.
    """

    mesh: DeviceMesh
    local: list[str] = field(default_factory=list)
    after: str | None = None
    partial: list[str] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    buffers: dict[str, Placement] = field(default_factory=dict)
    copies_inputs: bool = False
    stays: frozenset[str] = frozenset()
    beside: frozenset[str] = frozenset()
    heads: int = 0
    reduces_output: bool = False
    width: int | None = None
    mode: Callable[[nn.Module], AbstractContextManager[Any]] | None = None
    draws: Draws | None = None
    finish: Callable[[Any], Any] | None = None
    hooks: HooksAround | None = None
    check: FirstRunCheck | None = None
    positions: Positions | None = None
    names: tuple[str, ...] = ()

    def attach(self, module: nn.Module, patches: Patches) -> None:
        """Makes the module a region until the patches are undone."""
        parameters = inspect.signature(type(module).forward).parameters.values()
        self.names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))[1:]
        patches.set(module, _ATTRIBUTE, self)
        # a bound method on the instance: deepcopy binds it anew, and the hooks of the module stay outside of it
        patches.set(module, "forward", MethodType(_forward, module))

    @staticmethod
    def detach(module: nn.Module) -> None:
        """Takes a region off a module that is a copy of one."""
        if vars(module).pop(_ATTRIBUTE, None) is not None:
            vars(module).pop("forward", None)

    @staticmethod
    def of(module: nn.Module) -> Region | None:
        """The region that a module is, if it is one."""
        return vars(module).get(_ATTRIBUTE)

    def run(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """The module's own forward, on this rank's part."""
        if self.width is not None and args and args[0].shape[-1] == self.width:
            return type(module).forward(module, *args, **kwargs)  # with a weight that answers as the whole
        own: frozenset[int] = frozenset()
        if self.check is not None:
            if self.stays and any(self.check.own_outputs.values()):
                args, kwargs = tree_map(_without_opaque, (args, kwargs))
            self.check.before_run(module, self, args, kwargs)
            own = self.check.own_outputs.get(type(module), own)
        with nullcontext() if self.hooks is None else self.hooks.seen_whole(module, self, args, kwargs):
            output = self._run(module, args, kwargs)
        return _made_opaque(output, own) if own else output

    def _run(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        if self.copies_inputs:
            args, kwargs = self._copy_inputs(args, kwargs)
        with (
            self._local_view(module),
            self._draws_of(module),
            nullcontext() if self.mode is None else self.mode(module),
        ):
            output = type(module).forward(module, *args, **kwargs)
        if self.finish is not None:
            output = self.finish(output)
        if self.reduces_output:
            shared_again()
            output = self.reduce_output(output)
            bias = None if self.after is None else getattr(module, self.after)
            output = output if bias is None else output + bias.to(output.dtype)
        return output

    def _draws_of(self, module: nn.Module) -> AbstractContextManager[Any]:
        """What the module's forward runs in, as far as random numbers go."""
        if self.draws is None or not self.draws.now(module):
            return nullcontext()
        moves = self.draws.moves
        layers = self._column_layers(module) if self.draws.is_later else {}
        return self._begins_at(module, layers, moves) if layers else own_stream(self.mesh, moves)

    @contextmanager
    def _begins_at(self, module: nn.Module, layers: dict[str, nn.Module], moves: bool) -> Iterator[None]:
        """Inside, the first call of one of these layers begins a stream of this rank's own."""
        with own_stream(self.mesh, moves, begins=False) as stream:

            def begin(layer: Any, *args: Any, **kwargs: Any) -> Any:
                stream.begin()
                return type(layer).forward(layer, *args, **kwargs)

            forwards = {f"{name}.forward": MethodType(begin, layer) for name, layer in layers.items()}
            with overridden(module, forwards):
                yield

    def _column_layers(self, module: nn.Module) -> dict[str, nn.Module]:
        """By name, the layers below the module whose outputs are divided; none where it does not call them itself."""
        owners = dict.fromkeys(name.rpartition(".")[0] for name in self.local)
        if "" in owners or not self.copies_inputs or self.positions is not None:
            return {}
        return {name: module.get_submodule(name) for name in owners}

    def note_draws(self, module: nn.Module, draws: Drawn | None) -> None:
        """A module of this kind was seen to draw these random numbers."""
        if self.draws is not None:
            self.draws.noted = draws

    def reduce_output(self, partial: Tensor, dim: int = DIM) -> Tensor:
        """The sum of the ranks' parts; under sequence parallel this rank's positions (along ``dim``) of it."""
        if self.positions is not None and self.positions.is_inside:
            if partial.ndim == 2:  # samples and positions in one dim
                batch = partial.unflatten(0, (-1, self.positions.length))
                return reduce_scatter_to_sequence_region(batch, self.mesh, DIM).flatten(0, 1)
            return reduce_scatter_to_sequence_region(partial, self.mesh, dim)
        return reduce_from_tensor_region(partial, self.mesh)

    def _copy_inputs(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        positions = self.positions if self.positions is not None and self.positions.is_inside else None
        every = once_each(self.copied if positions is None else positions.gather_input)

        def copied(value: Any) -> Any:
            # what is not changed is not looked up: torch.compile would trace anew for each object
            return every(value) if positions is not None or getattr(value, "requires_grad", False) else value

        def prepared(name: str, value: Any) -> Any:
            if name in self.beside or self.is_own(name, value):
                return value
            return tree_map(lambda leaf: self._own_heads(name, copied(leaf)), value)

        return self.rewrite(args, kwargs, prepared)

    def is_own(self, name: str, value: Any) -> bool:
        """Whether an argument is of this rank's heads: one that another part makes, and not of all heads, or of none.

        A rank with one head can't tell that from what is the same for all, but where parts mark what they make.
        """
        if name not in self.stays or not isinstance(value, Tensor):
            return False
        if hasattr(value, _OWN):
            return True
        if value.ndim < 3 or not self.heads:
            return value.ndim > 2
        mine = self.heads // self.mesh.size()
        marks = self.check is not None and self.positions is None and not torch.compiler.is_compiling()
        return value.shape[HEADS_DIM] == mine and (mine > 1 or not marks)

    def _own_heads(self, name: str, value: Any) -> Any:
        """Of a bias or mask of all heads, (..., heads, queries, keys), that of this rank's."""
        if not (self.heads and isinstance(value, Tensor) and value.ndim > 2 and value.shape[HEADS_DIM] == self.heads):
            return value
        if name not in self.stays and not (value.ndim == 4 and any(word in name for word in _OF_HEADS)):
            return value
        return shard_of(value, Shard(value.ndim + HEADS_DIM), self.mesh)

    def copied(self, value: Tensor) -> Tensor:
        """What is whole on every rank, about to be used by each rank's part."""
        return copy_to_tensor_region(value, self.mesh) if value.requires_grad else value

    def rewrite(self, args: Args, kwargs: Kwargs, change: Callable[[str, Any], Any]) -> tuple[Args, Kwargs]:
        """The arguments of a call, each changed by its name in the forward's signature and its value."""
        names = (*self.names, *("*" for _ in args[len(self.names) :]))
        changed = tuple(change(name, value) for name, value in zip(names, args, strict=False))
        return changed, {name: change(name, value) for name, value in kwargs.items()}

    def is_given_own(self, args: Args, kwargs: Kwargs) -> bool:
        """Whether an argument is this rank's own, made by another part."""
        named = (*zip(self.names, args, strict=False), *kwargs.items())
        return any(self.is_own(name, value) for name, value in named)

    def whole_arguments(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The arguments as the whole module takes them; what another part made is (..., heads, queries, keys).

        Communication: one all-gather of each of those.
        """

        def gathered(name: str, value: Any) -> Any:
            return gather(value, self.mesh, value.ndim + HEADS_DIM) if self.is_own(name, value) else value

        return self.rewrite(args, kwargs, gathered)

    def whole_output(self, output: Tensor) -> Tensor:
        """The output as the whole module gives it."""
        return output

    def again(self) -> AbstractContextManager[Any]:
        """To be made in a forward, and entered, more than once too, while it is computed again in backward."""
        return nullcontext()

    def _local_view(self, module: nn.Module) -> AbstractContextManager[None]:
        """While it lasts, the module finds this rank's part under its names."""
        values: dict[str, Any] = {}
        for name in self.local:
            parameter = _divided_parameter(module, name)
            if parameter is not None:
                values[name] = on_axis(parameter, "tp")  # of a copy of a module that dp_shard divides too, it gathers
        bias = None if self.after is None else own_parameters(module)[self.after]
        if self.after is not None and bias is not None:
            # nn.Linear takes None; others, such as transformers' Conv1D, add what they find
            values[self.after] = None if isinstance(module, nn.Linear) else torch.zeros_like(bias)
        for name in self.partial if torch.is_grad_enabled() else ():
            replicated = _parameter(module, name)  # None where it is tied, or the module lacks it by now
            if replicated is not None and replicated.requires_grad:
                values[name] = seen_in_part(replicated, self.mesh)
        values |= self._numbers(type(module))
        values |= {name: shard_of(module.get_buffer(name), how, self.mesh) for name, how in self.buffers.items()}
        return overridden(module, values)

    @property
    def counts_heads(self) -> bool:
        """Whether one of its numbers is a :class:`HeadCount`."""
        return any(isinstance(number, HeadCount) for number in self.attributes.values())

    def _numbers(self, kind: type) -> dict[str, int]:
        """What the module sees in place of its own; plain ones where they were found to give the whole's result."""
        if self.check is None or torch.compiler.is_compiling() or kind in self.check.by_width:
            return self.attributes
        return {name: int(number) for name, number in self.attributes.items()}


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
    with overridden(module, {name: p.full_tensor() for name, p in divided.items()}):
        _whole.append(module)
        try:
            yield
        finally:
            _whole.pop()


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    owner, _, leaf = name.rpartition(".")
    return own_parameters(module.get_submodule(owner)).get(leaf)


def _divided_parameter(module: nn.Module, name: str) -> DTensor | None:
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
    return parameter


def once_each(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """Changes each tensor once: the same object stays the same, since modules ask whether query is key."""
    changed: dict[int, tuple[Tensor, Tensor]] = {}

    def once(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in changed:
            changed[id(value)] = (change(value), value)
        return changed[id(value)][0]

    return once


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among what a forward is given or returns."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class OpaquePart(Tensor):
    """A tensor that a part returns beside its output (the attention weights of its heads): passed on, but not used."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # what goes through an autograd.Function unchanged, as what a unit of fully_shard is given does
        passes = func is Tensor.view_as and args[0] is args[1]
        is_known = passes or (func is Tensor.register_hook and is_fully_shards(args[1]))
        if way_of(func) is not Way.ASK and not is_known:
            raise RuntimeError(
                "tp: a tensor that an attention or feed-forward module returns beside its output is this rank's part "
                "of it (of its heads, or columns): leave the module whole with tensor_plan=, or use another axis"
            )
        with DisableTorchFunctionSubclass():
            output = func(*args, **(kwargs or {}))
            return output.as_subclass(cls) if passes else output


def _made_opaque(output: Any, own: frozenset[int]) -> Any:
    """What a part returned, with those of its tensors made opaque that are its own, by their number."""
    numbers = itertools.count()

    def opaque(leaf: Any) -> Any:
        return leaf.as_subclass(OpaquePart) if isinstance(leaf, Tensor) and next(numbers) in own else leaf

    return tree_map(opaque, output)


def _without_opaque(leaf: Any) -> Any:
    """As a plain tensor with a mark, for parts, which know what they are."""
    if not isinstance(leaf, OpaquePart):
        return leaf
    with DisableTorchFunctionSubclass():
        plain = leaf.as_subclass(Tensor)
    setattr(plain, _OWN, True)
    return plain


def copy_of(tensor: Tensor) -> Tensor:
    """A copy that is marked as the tensor is."""
    copy = tensor.clone()
    if hasattr(tensor, _OWN):
        setattr(copy, _OWN, True)
    return copy


@contextmanager
def overridden(module: nn.Module, values: dict[str, Any]) -> Iterator[None]:
    """While it lasts, the module (or one below it) finds these values under these dotted names."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, value in values.items():
            owner, _, leaf = name.rpartition(".")
            own = vars(module.get_submodule(owner))
            before.append((own, leaf, own.get(leaf, _MISSING)))
            own[leaf] = value
        yield
    finally:
        for own, leaf, value in reversed(before):
            if value is _MISSING:
                del own[leaf]
            else:
                own[leaf] = value
