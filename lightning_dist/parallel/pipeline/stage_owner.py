"""Which rank of the pipeline holds what a staged tensor stands for, and its values where the user asks for them."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType, MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_dist.divided.readers import DEEPEST, LIBRARIES, meet
from lightning_dist.divided.tensor import as_divided
from lightning_dist.divided.whole import whole as gathered
from lightning_dist.patches import Patches
from lightning_dist.placeholder import PIPELINE_SHARE, is_placeholder, placeholder

_STAGE = "lightning_dist_stage"
"""Attribute of a staged tensor: its :class:`StageOwner`."""


class StageOwner:
    """Where the values of a tensor are.

    Args:
        name: of the parameter that it is, or was computed from.
        source: the first rank of the group that holds it.
        group: the ranks of the pipeline; None where there are none any more.
        divided: whether the ranks that hold it may have parts of it.
    """

    def __init__(self, name: str, source: int, group: dist.ProcessGroup | None, divided: bool) -> None:
        self.name, self.source, self.group, self.divided = name, source, group, divided

    def __deepcopy__(self, _: Any) -> StageOwner:
        return self

    def __reduce__(self) -> Any:
        return StageOwner, (self.name, self.source, None, self.divided)  # a group is this process's


class Staged:
    """A tensor that stands for that of a stage on every rank; see [Note: what a stage holds]."""

    __slots__ = ()


_STAGED_AS: dict[type, type] = {}
"""The class of staged tensors, by that of plain ones."""
_PLAIN_AS: dict[type, type] = {}


def stand_for(kinds: dict[type, type]) -> None:
    """Registers the classes of staged tensors, by those of plain ones."""
    _STAGED_AS.update(kinds)
    _PLAIN_AS.update({staged_kind: plain for plain, staged_kind in kinds.items()})


def staged(tensor: Any, owner: StageOwner) -> Any:
    """Makes a tensor stand for that of an owner, in place; anything else as it is."""
    kind = _STAGED_AS.get(type(tensor))
    if kind is not None:
        tensor.__class__ = kind
        vars(tensor)[_STAGE] = owner
    return tensor


def owner_of(tensor: Any) -> StageOwner:
    """The stage that owns a staged tensor."""
    return vars(tensor)[_STAGE]


def origin(tensor: Any) -> str | None:
    """The name of the parameter that it is, or was copied from; None for what was never staged."""
    place = vars(tensor).get(_STAGE)
    return None if place is None else place.name


_plain: list[None] = []
"""While not empty, staged tensors are what they are without their classes."""


def are_plain() -> bool:
    """Whether a step or an optimizer runs, for which parameters are plain ones."""
    return bool(_plain)


@contextmanager
def plain_parameters(parameters: Iterable[Any]) -> Iterator[None]:
    """While it lasts, these parameters are what they are without stages, and those of others tensors without memory."""
    found = _recast(parameters, _PLAIN_AS)
    _plain.append(None)
    try:
        yield
    finally:
        _plain.pop()
        _recast(found, _STAGED_AS)


@contextmanager
def staged_parameters(parameters: Iterable[Any]) -> Iterator[None]:
    """Inside of :func:`plain_parameters`: staged tensors stand for the whole again."""
    before = _plain[:]
    _plain.clear()
    found = _recast(parameters, _STAGED_AS)
    try:
        yield
    finally:
        _recast(found, _PLAIN_AS)
        _plain[:] = before


def _recast(parameters: Iterable[Any], kinds: dict[type, type]) -> list[Any]:
    """Gives parameters of this rank's stages other classes; returns those that it concerned."""
    found = [p for p in parameters if type(p) in kinds and _STAGE in vars(p) and not is_placeholder(p)]
    for parameter in found:
        parameter.__class__ = kinds[type(parameter)]
    return found


def forget_stages(module: nn.Module) -> None:
    """Parameters of this rank's stages are the user's own again, without our marks."""
    for parameter in module.parameters():
        if type(parameter) in _PLAIN_AS:
            parameter.__class__ = _PLAIN_AS[type(parameter)]
        for mark in (_STAGE, PIPELINE_SHARE):
            vars(parameter).pop(mark, None)


def beside(target: Any, leaf: Any, what: str, line: FrameType) -> Any:
    """An argument beside a staged tensor: as it is if it is of the same owner or of none, else sent."""
    if not isinstance(leaf, Staged) or leaf is target or not isinstance(target, Staged):
        return leaf
    return leaf if owner_of(leaf).source == owner_of(target).source else whole_of(leaf, what, line)


def whole_of(leaf: Any, what: str, line: FrameType) -> Any:
    """The values of a staged tensor, sent; anything else as it is."""
    if not isinstance(leaf, Staged):
        return leaf
    assert isinstance(leaf, Tensor)
    return sent(leaf.detach(), owner_of(leaf), what, line)


def sent(tensor: Tensor, owner: StageOwner, what: str, line: FrameType) -> Tensor:
    """A tensor that the owner's rank has, by a broadcast over the pipeline; raises a RuntimeError where it can't be
    sent, or not all ranks ask.
    """
    if owner.group is None or not dist.is_initialized():
        raise RuntimeError(
            f"pp: {where(line)}: {what} {owner.name}, which the process of another stage held: this one knows its "
            "shape only, and the process group is gone; read it in a hook of the fit, or from a checkpoint"
        )
    meet(line, dist.get_process_group_ranks(owner.group))
    if dist.get_rank(owner.group) != owner.source:
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    elif isinstance(tensor, DTensor):
        value = gathered(tensor).detach().contiguous()
    else:
        value = tensor.as_subclass(Tensor).contiguous().clone()
    dist.broadcast(value, group=owner.group, group_src=owner.source)
    return value


def where(line: FrameType) -> str:
    """What to call a line in an error."""
    return f"{line.f_code.co_qualname}, line {line.f_lineno}"


def line_of_user() -> FrameType | None:
    """The innermost frame around the caller's that is no library's; None where Lightning, this package or an optimizer
    asks. Lightning's callbacks read and write parameters as a user's do.
    """
    frame: FrameType | None = sys._getframe(2)
    for _ in range(DEEPEST):
        if frame is None:
            return None
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith(_ALLOWED) and not name.startswith("lightning_dist.divided."):
            return None
        if frame.f_code.co_varnames[:1] == ("self",) and isinstance(frame.f_locals.get("self"), torch.optim.Optimizer):
            return None
        if name.partition(".")[0] not in LIBRARIES or name.startswith("lightning.pytorch.callbacks"):
            return frame
        frame = frame.f_back
    return None


_ALLOWED = (
    "lightning_dist.",
    "lightning.pytorch.loops",
    "lightning.pytorch.trainer",
    "lightning.pytorch.strategies",
    "lightning.pytorch.utilities.model_summary",
)
"""Whose own code asks for what it may."""


class _StagedStates(defaultdict[Any, Any]):
    """The states of an optimizer, by parameter; of a parameter of another stage, that of its rank."""

    def __getitem__(self, parameter: Any) -> Any:
        """The user's code gets what can be read, and tensors that can be written to."""
        if isinstance(parameter, Staged) and not are_plain() and (line := line_of_user()) is not None:
            return _state_of(self.get(parameter, {}), parameter, line)
        return super().__getitem__(parameter)


def show_states(optimizer: Any, patches: Patches) -> None:
    """Puts the states of all stages' parameters in place of an optimizer's own."""
    if type(optimizer.state) is defaultdict:
        optimizer.state = _StagedStates(dict, optimizer.state)
        patches.also(partial(_hide_states, optimizer))


def _hide_states(optimizer: Any) -> None:
    if type(optimizer.state) is _StagedStates:
        optimizer.state = defaultdict(dict, optimizer.state)


def _state_of(own: dict[str, Any], parameter: Any, line: FrameType) -> Any:
    """Communication over the pipeline: one broadcast of the names, shapes and numbers."""
    owner = owner_of(parameter)
    if owner.group is None or not dist.is_initialized():
        return MappingProxyType(own)
    meet(line, dist.get_process_group_ranks(owner.group))
    box: list[Any] = [{key: (tuple(v.shape), v.dtype) if isinstance(v, Tensor) else (v,) for key, v in own.items()}]
    dist.broadcast_object_list(box, group=owner.group, group_src=owner.source)
    there: dict[str, Any] = {}
    for key, what in box[0].items():
        if key in own:
            there[key] = staged(as_divided(own[key].detach()), owner) if isinstance(own[key], Tensor) else own[key]
        elif len(what) == 2:
            like = torch.empty(what[0], dtype=what[1], device="meta")
            there[key] = staged(placeholder(like, parameter.device), owner)
        else:
            (there[key],) = what
    return MappingProxyType(there)
