"""Steps of torch's own optimizers over what this rank holds of their parameters, as plain tensors.

[Note: steps over local parts]
An optimizer that works element by element does over this rank's parts what it does over the whole. Divided tensors pass
a dispatch in Python once per operation and parameter, and are no tensors that torch chooses ``foreach`` for. So between
the closure and the hooks after a step the groups have the local parts in place of the divided parameters, with their
gradients and states: one step in the kernels that the user asked for, or those that torch chooses on the device, over
all parameters, whatever their meshes. Then the parameters are back, and states are divided tensors as before.

That is shown for torch's own code alone: the user's, in an optimizer or around one, sees wholes. A step in which
anything is not as here (a gradient of another layout, a ``differentiable`` one) goes over the divided tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import wraps
from itertools import chain, compress
from operator import is_
from types import MethodType
from typing import Any

from torch import Tensor, optim
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_dist.compat.operators import (
    INIT_GROUP,
    LAYOUT,
    LOCAL_PART,
    divided_tensor,
    is_divided_alike,
    register_first_step_post_hook,
)
from lightning_dist.compat.torch import DisableTorchFunctionSubclass
from lightning_dist.patches import Patches

ELEMENTWISE = (
    *(optim.Adadelta, optim.Adagrad, optim.Adam, optim.AdamW, optim.Adamax, optim.ASGD, optim.NAdam, optim.RAdam),
    *(optim.RMSprop, optim.Rprop, optim.SGD),
)
"""Those of torch that change each element by the same one of gradient and states."""

_OF_A_STEP = ("step", INIT_GROUP, "param_groups", "state")


def step_over_local_parts(optimizer: Optimizer, patches: Patches) -> None:
    """Makes an optimizer step over local parts, if it is one of torch's that may; see [Note: steps over local parts].

    Any other stays as it is, and so does one whose ``step`` the user replaced or compiled. Communication: none. Memory:
    none beside what the optimizer's own step takes over plain tensors of the sizes of the parts.
    """
    original: Any = optimizer.step
    own = type(optimizer).step
    is_own = (
        getattr(original, "__func__", None) is own or getattr(original, "__wrapped__", None) is own
    )  # a scheduler's
    if not is_own or not _is_elementwise(type(optimizer)):
        return
    local = _LocalStep(optimizer)

    @wraps(original)
    def step(_: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        return local.run(original, closure)

    patches.set(optimizer, "step", MethodType(step, optimizer))
    patches.also(register_first_step_post_hook(optimizer, lambda *_: local.leave()).remove)
    if getattr(optimizer.zero_grad, "__func__", None) is Optimizer.zero_grad:
        patches.set(optimizer, "zero_grad", MethodType(_zero_grad, optimizer))


@wraps(Optimizer.zero_grad)
def _zero_grad(optimizer: Optimizer, set_to_none: bool = True) -> None:
    """Each gradient that is looked at passes a function in Python, if it is not off; zeros are filled in by it."""
    with DisableTorchFunctionSubclass() if set_to_none else nullcontext():
        Optimizer.zero_grad(optimizer, set_to_none)


def _is_elementwise(kind: type) -> bool:
    """Whether the step of a class is that of one of torch's, whatever else it adds."""
    classes = kind.__mro__
    own = next((index for index, one in enumerate(classes) if one in ELEMENTWISE), None)
    return own is not None and not any(name in vars(one) for one in classes[:own] for name in _OF_A_STEP)


class _LocalStep:
    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._parts: _Parts | None = None
        self._states: _States | None = None
        self._whole: tuple[Any, Any] | None = None
        """The groups and the states of the optimizer, while local ones are in their place."""

    def run(self, original: Callable[..., Any], closure: Callable[[], Any] | None) -> Any:
        def evaluated() -> Any:
            loss = None if closure is None else closure()
            self._enter()
            return loss

        try:
            return original(closure=evaluated)
        finally:
            self.leave()

    def _enter(self) -> None:
        self.leave()  # of a hook that evaluated the closure, too
        groups, state = self._optimizer.param_groups, self._optimizer.state
        if any(group.get("differentiable") for group in groups):
            return
        with DisableTorchFunctionSubclass():
            if self._parts is None or not self._parts.are_those_of(groups):
                self._parts = _Parts(groups)
                self._states = _States(self._parts)
            if not (self._parts.can_step and self._states.take(state) and self._parts.take_gradients()):
                return
        self._whole = groups, state
        self._optimizer.state = self._states.local
        self._optimizer.param_groups = [
            {**group, "params": local} for group, local in zip(groups, self._parts.groups, strict=True)
        ]

    def leave(self) -> None:
        """The parameters are in their place again."""
        if self._whole is None or self._parts is None or self._states is None:
            return
        self._optimizer.param_groups, self._optimizer.state = self._whole
        self._whole = None
        with DisableTorchFunctionSubclass():
            self._states.give_back(self._optimizer.state)
            self._parts.drop_gradients()


class _Parts:
    """What this rank holds of the parameters of an optimizer's groups."""

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._sizes = [len(group["params"]) for group in groups]
        self._whole = [p for group in groups for p in group["params"]]
        self._divided = [p for p in self._whole if isinstance(p, DTensor)]
        self._held = [*map(LOCAL_PART, self._divided)]
        self._local = [held.detach() for held in self._held]
        self._layouts = [*map(LAYOUT, self._divided)]
        self._given: tuple[list[Tensor], list[DTensor]] = [], []
        """Local parts that have a gradient for now, and their parameters."""
        self.local_of = dict(zip(map(id, self._divided), self._local, strict=True))
        self.divided_of = dict(zip(map(id, self._local), self._divided, strict=True))
        self.groups = [[self.local_of.get(id(p), p) for p in group["params"]] for group in groups]
        # a state of no dim may be of the parameter, or a number beside it
        self.can_step = bool(self._divided) and all(p.ndim for p in self._divided)

    def are_those_of(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        now = [p for group in groups for p in group["params"]]
        is_same = _same(now, self._whole) and [len(group["params"]) for group in groups] == self._sizes
        return is_same and _same([*map(LOCAL_PART, self._divided)], self._held)

    def take_gradients(self) -> bool:
        """Gives the parts their gradients, if all of these are divided as the parameters are."""
        gradients: list[Any] = [p.grad for p in self._divided]
        local, divided, layouts = self._local, self._divided, self._layouts
        there = [gradient is not None for gradient in gradients]
        if not all(there):
            gradients, local = [*compress(gradients, there)], [*compress(local, there)]
            divided, layouts = [*compress(divided, there)], [*compress(layouts, there)]
        try:
            if [*map(LAYOUT, gradients)] != layouts:
                return False
        except AttributeError:  # a plain one
            return False
        for one, part in zip(local, map(LOCAL_PART, gradients), strict=True):
            one.grad = part
        self._given = local, divided
        return True

    def drop_gradients(self) -> None:
        """They are the user's to free; and the parameters have been written to."""
        local, divided = self._given
        self._given = [], []
        for one in local:
            one.grad = None
        increment_version(divided)


class _States:
    """An optimizer's states over local parts; ``local`` is made anew where the optimizer's are other ones."""

    def __init__(self, parts: _Parts) -> None:
        self._parts = parts
        self.local: defaultdict[Any, Any] = defaultdict(dict)
        self._seen: list[list[Any]] = [[], [], []]
        """Of the optimizer's: keys, values, and the local parts of these, held, so that a new one is another."""
        self._divided: list[DTensor] = []
        self._before: list[Any] = []
        """The values of the local ones."""

    def take(self, state: Mapping[Any, Any]) -> bool:
        """Whether all states of the divided parameters are laid out as these."""
        now = [*state], _values(state), [*map(LOCAL_PART, self._divided)]
        if not all(map(_same, now, self._seen)):
            if not self._localise(state):
                return False
            self._note(state)
        return True

    def _note(self, state: Mapping[Any, Any]) -> None:
        values = _values(state)
        self._divided = [value for value in values if isinstance(value, DTensor)]
        self._seen = [[*state], values, [*map(LOCAL_PART, self._divided)]]
        self._before = _values(self.local)

    def _localise(self, state: Mapping[Any, Any]) -> bool:
        self.local, self._seen = defaultdict(dict), [[], [], []]
        for key, own in state.items():
            local = self._parts.local_of.get(id(key))
            if local is None:
                self.local[key] = own
            elif all(_is_beside(value, key) for value in own.values()):
                self.local[local] = {name: _local(value) for name, value in own.items()}
            else:
                return False
        return True

    def give_back(self, state: Any) -> None:
        """Notes what a step made, as divided tensors."""
        if _same(_values(self.local), self._before):
            return
        for key, own in self.local.items():
            whole = self._parts.divided_of.get(id(key))
            if whole is None:
                if key not in state:
                    state[key] = own
                continue
            there = state[whole]
            for name, value in own.items():
                if name not in there or _local(there[name]) is not value:
                    there[name] = _divided(value, whole)
        self._note(state)


def _values(state: Mapping[Any, Any]) -> list[Any]:
    return [*chain.from_iterable(map(dict.values, state.values()))]


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(is_, one, other))


def _is_beside(value: Any, whole: DTensor) -> bool:
    """Whether an entry of a state is divided as the parameter, or no tensor of elements."""
    if isinstance(value, DTensor):
        return is_divided_alike(value, whole)
    return not isinstance(value, Tensor) or not value.ndim


def _local(value: Any) -> Any:
    return LOCAL_PART(value) if isinstance(value, DTensor) else value


def _divided(value: Any, whole: DTensor) -> Any:
    return divided_tensor(type(whole), value, whole) if isinstance(value, Tensor) and value.ndim else value
