"""A second optimizer like the user's, over small tensors in place of the parameters.

[Note: copying an optimizer]
A constructor's arguments are gone once it has run, and many keep more than groups, states and defaults: Lookahead the
optimizer inside and its slow weights, LBFGS a list of its parameters. So the object itself is copied as it is now:
wherever it keeps a parameter, the copy keeps the small one. Parameters that no small tensor stands for are left out of
lists and dictionaries, and so is what lies beside them in a list that goes parallel to theirs. Functions, modules,
meshes and process groups are shared. Hooks and functions set on the object, such as the ``step`` by which schedulers
count, are the user's own and would see the small tensors: left out.
"""

from __future__ import annotations

import copy
import math
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_dist.compat.distributed import StridedShard
from lightning_dist.compat.operators import DTENSOR_ATTRIBUTES, HOOKS_OF_OPTIMIZERS
from lightning_dist.dtensors import divided_from, held_indices_of, local_part
from lightning_dist.placeholder import is_placeholder, placeholder_parameter

LEAST_LR = 1e-2
"""A schedule may begin at zero; and steps have to be larger than the rounding of what they change."""

_SHARED = (nn.Module, LRScheduler, types.FunctionType, types.BuiltinFunctionType, type, types.ModuleType)

LONG, SHORT = 160, 4
"""Sizes of the two longest dims and of the others, at most: optimizers that factor do so from 128 on."""

NOT_OPTIONS = frozenset({"params", "lr", "initial_lr", "param_names", "name"})
"""Entries of a parameter group that don't change what a step does with it, but for its length."""


class Twin:
    """A copy of an optimizer. See [Note: copying an optimizer].

    Args:
        optimizer: the user's, which stays as it is.
        smalls: what stands for which of its parameters.
        make: the parameter of the copy for one of these.
        lay_out: a whole small tensor beside a parameter, as a state of it in the copy.
        starts: of the states that were copied before, by identity, from :func:`start_of`; added to.

    Communication: none for an optimizer without states; else see :func:`start_of`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        smalls: list[Small],
        make: Callable[[Small], Tensor],
        lay_out: Callable[[Small, Tensor], Tensor],
        starts: dict[int, Tensor],
    ) -> None:
        self._lay_out, self._starts = lay_out, starts
        self._small = {id(small.parameter): small for small in smalls}
        self.parameters = {id(small.parameter): make(small) for small in smalls}
        self._copies: dict[int, Any] = dict(self.parameters)
        self._rows = [group["params"] for group in optimizer.param_groups]
        self._rows.append([p for row in self._rows for p in row])
        self._known = {id(p) for p in self._rows[-1]}
        self.optimizer: Optimizer = self._copy(optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = _no_less(group.get("lr"), LEAST_LR)

    def _copy(self, value: Any, owner: Small | None = None) -> Any:
        if id(value) in self._copies:
            return self._copies[id(value)]
        copied: Any
        if isinstance(value, Tensor):
            copied = self._copy_tensor(value, owner)
        elif isinstance(value, Optimizer):
            return self._copy_optimizer(value)
        elif isinstance(value, dict):
            return self._copy_dict(value, owner)
        elif isinstance(value, list | tuple | set | deque):
            return self._copy_row(value, owner)
        elif isinstance(value, types.MethodType):
            copied = types.MethodType(value.__func__, self._copy(value.__self__))
        elif isinstance(value, _SHARED) or not hasattr(value, "__dict__"):
            return value
        elif type(value).__module__.partition(".")[0] in ("lightning", "pytorch_lightning", "torch"):
            return value  # which an optimizer may refer to, but is not its state
        else:
            copied = copy.copy(value)
            self._copies[id(value)] = copied
            vars(copied).update({name: self._copy(item) for name, item in vars(value).items()})
        self._copies[id(value)] = copied
        return copied

    def _copy_optimizer(self, optimizer: Optimizer) -> Optimizer:
        copied = object.__new__(type(optimizer))
        self._copies[id(optimizer)] = copied
        for name, value in vars(optimizer).items():
            if name.startswith(HOOKS_OF_OPTIMIZERS) and isinstance(value, OrderedDict):
                vars(copied)[name] = OrderedDict()
            elif not (callable(value) and hasattr(type(optimizer), name)):
                vars(copied)[name] = self._copy(value)
        return copied

    def _copy_dict(self, value: dict[Any, Any], owner: Small | None) -> Any:
        copied = copy.copy(value)
        copied.clear()
        self._copies[id(value)] = copied
        for key, item in value.items():
            if id(key) not in self._known:
                copied[key] = self._copy(item, owner)
            elif id(key) in self._small:
                copied[self._copies[id(key)]] = self._copy(item, self._small[id(key)])
        return copied

    def _copy_row(self, value: Any, owner: Small | None) -> Any:
        if any(id(item) in self._known for item in value):
            items = [self._copy(v) for v in value if id(v) in self._small or id(v) not in self._known]
        elif owner is None and (beside := self._beside(value)) is not None:
            pairs = zip(value, beside, strict=True)
            items = [self._copy(v, self._small[id(p)]) for v, p in pairs if id(p) in self._small]
        else:
            items = [self._copy(item, owner) for item in value]
        if isinstance(value, tuple):
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        copied = type(value)(items)
        self._copies[id(value)] = copied
        return copied

    def _beside(self, value: Iterable[Any]) -> list[Tensor] | None:
        """The parameters that a list of tensors goes parallel to."""
        items = list(value)
        if not items or not all(isinstance(item, Tensor) for item in items):
            return None
        for row in self._rows:
            if len(row) == len(items) and all(v.shape == p.shape for v, p in zip(items, row, strict=True)):
                return row
        return None

    def _copy_tensor(self, value: Tensor, owner: Small | None) -> Tensor:
        if is_placeholder(value):
            return value
        if owner is None or value.ndim == 0 or value.shape != owner.parameter.shape:
            return value.detach().clone().requires_grad_(value.requires_grad)
        if id(value) not in self._starts:
            self._starts[id(value)] = start_of(value, owner)
        return self._lay_out(owner, self._starts[id(value)])


def start_of(state: Tensor, small: Small) -> Tensor:
    """What a small state starts from: the state's one value, or the small parameter's where it is the parameter's copy.

    Communication: one all-reduce of three numbers over each axis that divides the parameter.
    """
    held, parameter = local_part(state), local_part(small.parameter)
    bounds = torch.full((3,), torch.inf, dtype=torch.float64, device=held.device)
    if held.numel():
        distance = (held - parameter).abs().max() if held.shape == parameter.shape else held.new_tensor(torch.inf)
        bounds = torch.stack([held.min(), -held.max(), -distance]).double()
    if isinstance(small.parameter, DTensor):
        mesh = small.parameter.device_mesh
        for axis, placement in enumerate(small.parameter.placements):
            if not placement.is_replicate():
                dist.all_reduce(bounds, dist.ReduceOp.MIN, group=mesh.get_group(axis))
    lowest, highest, furthest = float(bounds[0]), -float(bounds[1]), -float(bounds[2])
    if furthest == 0:
        return small.value
    # of a run before this one: any value that a mean of squares may have
    return torch.full_like(small.value, lowest) if lowest == highest else small.slope.abs()


def _no_less(lr: Any, least: float) -> Any:
    if isinstance(lr, Tensor):
        return lr.detach().clone().clamp(min=least)
    return max(lr, least) if isinstance(lr, float | int) and not isinstance(lr, bool) else lr


class Small:
    """What stands for one parameter.

    Args:
        parameter: of the module: plain, a DTensor or a placeholder.
        number: of it, from which its values are drawn: the same on every rank.
    """

    def __init__(self, parameter: Tensor, number: int) -> None:
        self.parameter = parameter
        generator = torch.Generator().manual_seed(number)
        shape, dtype, self.device = _small_shape(parameter), parameter.dtype, parameter.device
        if dtype.is_floating_point and dtype != torch.float64:
            dtype = torch.float32  # 16 bits round more
        drawn = dtype if dtype.is_floating_point or dtype.is_complex else torch.float32
        self.value = torch.randn(shape, generator=generator, dtype=drawn).to(self.device, dtype)
        self.slope = torch.randn(shape, generator=generator, dtype=drawn).to(self.device, dtype)

    def whole(self) -> Tensor:
        """A plain parameter."""
        return _marked(nn.Parameter(self.value.clone(), self.parameter.requires_grad), self.parameter)

    def divided(self) -> Tensor:
        """As the parameter is: this rank's part of it, a plain tensor, or a placeholder."""
        if is_placeholder(self.parameter):
            whole = nn.Parameter(self.value, self.parameter.requires_grad)
            return placeholder_parameter(_marked(whole, self.parameter))
        return _marked(as_divided(self.value, self.parameter), self.parameter)


def as_divided(whole: Tensor, like: Tensor) -> nn.Parameter:
    """A parameter of the value ``whole``, divided over the ranks and of the class as the parameter ``like``."""
    if not isinstance(like, DTensor):
        return nn.Parameter(whole.clone(), like.requires_grad)
    part = this_ranks_part(whole, like)
    parameter: Any = nn.Parameter(divided_from(part, like, whole.shape, whole.stride()), like.requires_grad)
    parameter.__class__ = type(like)
    return parameter


def this_ranks_part(whole: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of a tensor that is divided as ``like``, which may be of another size. A copy."""
    if not isinstance(like, DTensor):
        return whole.clone()
    part = whole.detach()
    for dim, index in enumerate(held_indices_of(whole.shape, like.device_mesh, like.placements)):
        part = part.index_select(dim, index.to(part.device))
    return part.clone(memory_format=torch.contiguous_format)


def _small_shape(parameter: Tensor) -> tuple[int, ...]:
    """As few elements as take the same way through an optimizer, divided as the parameter is."""
    units = [1] * parameter.ndim
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for name, placement, ranks in zip(mesh.mesh_dim_names or (), parameter.placements, mesh.shape, strict=True):
            if name == "tp" and not placement.is_replicate():
                pieces = placement.split_factor if isinstance(placement, StridedShard) else 1
                units[placement.dim] *= pieces * int(ranks)  # type: ignore[attr-defined, assignment]
    longest = sorted(range(parameter.ndim), key=lambda dim: -parameter.shape[dim])[:2]
    limits = [LONG if dim in longest else SHORT for dim in range(parameter.ndim)]
    return tuple(
        size if size <= limit or size <= unit else max(unit, limit - limit % unit)
        for size, limit, unit in zip(parameter.shape, limits, units, strict=True)
    )


def representatives(optimizer: Optimizer) -> list[Tensor]:
    """The largest and the smallest parameter of each kind, in each parameter group with options of its own."""
    chosen: dict[int, Tensor] = {}
    seen = set()
    for group in optimizer.param_groups:
        kinds: dict[Any, list[Tensor]] = {}
        for parameter in group["params"]:
            kinds.setdefault(_kind(parameter), []).append(parameter)
        options = repr([(name, group[name]) for name in sorted(group, key=str) if name not in NOT_OPTIONS])
        if (options, frozenset(kinds)) in seen:
            continue
        seen.add((options, frozenset(kinds)))
        for same in kinds.values():
            by_size = sorted(same, key=lambda parameter: math.prod(parameter.shape))
            chosen |= {id(parameter): parameter for parameter in (by_size[-1], by_size[0])}
    return list(chosen.values())


def all_parameters(groups: Iterable[dict[str, Any]]) -> list[Tensor]:
    """The parameters of all groups, each once."""
    return list({id(p): p for group in groups for p in group["params"]}.values())


def _kind(parameter: Tensor) -> Any:
    layout = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
    return parameter.ndim, parameter.dtype, parameter.requires_grad, layout, is_placeholder(parameter)


def _marked(small: nn.Parameter, parameter: Tensor) -> nn.Parameter:
    """With what users wrote on the parameter, which optimizers may read."""
    for name, value in vars(parameter).items():
        if name not in DTENSOR_ATTRIBUTES:
            setattr(small, name, value)
    return small
