"""Parameters of a pipeline's stages in the user's hands: each stands for the whole, on every rank.

[Note: what a stage holds]
A rank of a pipeline holds the parameters of its stages; in place of the others it has tensors without memory, so that
``parameters()``, names and an optimizer's groups are whole. Hooks, callbacks and optimizers go through all of them, on
every rank alike. What they do element by element (in place or not, with numbers, with tensors of the same stage) runs
where the tensor is, and nothing is communicated. What asks for a number (a norm, ``.item()``, a matrix product), and
what pairs tensors of two stages, is sent from the rank that holds it. Random numbers that a tensor of another stage
would be given are drawn and dropped, so that the streams of the ranks stay alike. In a step, and while an optimizer
steps, they are parameters and tensors without memory, and nothing else.

Under ``tp`` and ``dp_shard`` the rank that holds a parameter has a part of it (a
:class:`~lightning_dist.divided.tensor.Divided`). What runs where the tensor is, runs on it as it does without stages;
what is sent is gathered first, by the ranks that hold parts. A view of it is a view of the whole there, and a copy on
the ranks of other stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from lightning_dist.compat.torch import DisableTorchFunctionSubclass, FakeTensor
from lightning_dist.divided.functions import Way, name_of, way_of
from lightning_dist.divided.tensor import Divided
from lightning_dist.parallel.pipeline.stage_owner import Staged, are_plain, owner_of, stands_for
from lightning_dist.parallel.pipeline.stage_sends import whole_of
from lightning_dist.parallel.pipeline.staged_functions import equal, function_of_way, on_this_rank
from lightning_dist.parallel.pipeline.user_frames import line_of_user, where


class _Functions(Staged):
    """Runs torch functions by what they do."""

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        way = way_of(func)
        with DisableTorchFunctionSubclass():
            if way is Way.ASK or are_plain() or (line := line_of_user()) is None:
                return on_this_rank(func, args, kwargs)
            if name_of(func) == "equal":
                return equal(func, args, kwargs, line)
            return function_of_way(way)(func, args, kwargs, line)


class _Pickled:
    """The user's code pickles the whole (``torch.save`` of weights, on all ranks alike); ours, what is here."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        tensor: Any = self
        line = None if are_plain() else line_of_user()
        can_send = dist.is_initialized() and owner_of(self).group is not None
        if line is not None and (can_send or isinstance(self, RemoteTensor)):
            with DisableTorchFunctionSubclass():
                whole = whole_of(tensor, "pickle", line)
                if isinstance(tensor, nn.Parameter):
                    whole = nn.Parameter(whole, requires_grad=tensor.requires_grad)
                return whole.__reduce_ex__(protocol)
        if isinstance(tensor, (OwnTensor, OwnParameter)):
            plain = nn.Parameter if isinstance(tensor, OwnParameter) else Tensor
            with DisableTorchFunctionSubclass():
                return tensor.as_subclass(plain).__reduce_ex__(protocol)
        return super().__reduce_ex__(protocol)


@stands_for(FakeTensor)
class RemoteTensor(_Pickled, _Functions, FakeTensor):
    """A parameter of another stage, or what is computed of it; see [Note: what a stage holds]."""


@stands_for(nn.Parameter)
class OwnParameter(_Pickled, _Functions, nn.Parameter):
    """A parameter of this rank's stages."""


@stands_for(Tensor)
class OwnTensor(_Pickled, _Functions, Tensor):
    """A gradient of one, or what is computed of it."""


@stands_for(Divided)
class OwnDivided(_Pickled, _Functions, Divided):
    """A parameter of this rank's stages of which it holds a part, its gradient, or what is computed of them."""


def callable_parts(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of a module with parameters that have a forward: its children, or those of lists and dictionaries."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from callable_parts(child)
        elif any(True for _ in child.parameters()):
            yield child


def refuse_outside(module: nn.Module, args: Any) -> None:
    """A hook before the forward of a part of which ranks hold parts.

    Raises:
        RuntimeError: no step is running, in which the stages take turns.
    """
    if not are_plain() and (line := line_of_user()) is not None:
        raise RuntimeError(
            f"pp beside tp or dp_shard: {where(line)} calls a {type(module).__name__} outside of a step, and each "
            "rank has parts of some of its layers only; call it in training_step, validation_step or predict_step, or "
            "use pp alone"
        )
