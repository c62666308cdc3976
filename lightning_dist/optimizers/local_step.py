"""Steps of torch's own optimizers over what this rank holds of their parameters, as plain tensors.

[Note: steps over local parts]
An optimizer that works element by element does over this rank's parts what it does over the whole. Divided tensors pass
a dispatch in Python once per operation and parameter, and are no tensors that torch chooses ``foreach`` for. So between
the closure and the hooks after a step the groups have the local parts in place of the divided parameters, with their
gradients and states: one step in the kernels that the user asked for, or those that torch chooses on the device, over
all parameters, whatever their meshes. Then the parameters are back, and states are divided tensors as before. The lists
that torch collects for a step are kept for the next one, see ``collected.py``.

That is shown for torch's own code alone: the user's, in an optimizer or around one, sees wholes. A step in which
anything is not as here (a gradient of another layout, a ``differentiable`` one) goes over the divided tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from types import MethodType
from typing import Any

from torch import optim
from torch.optim import Optimizer

from lightning_dist.compat.operators import INIT_GROUP, register_first_step_post_hook
from lightning_dist.compat.torch import DisableTorchFunctionSubclass
from lightning_dist.optimizers.collected import Collected
from lightning_dist.optimizers.local_parts import LocalParts, LocalStates
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
    # a scheduler that counts steps wraps the function itself
    is_own = own in (getattr(original, "__func__", None), getattr(original, "__wrapped__", None))
    if not is_own or INIT_GROUP in vars(optimizer) or not _is_elementwise(type(optimizer)):
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
        self._parts = LocalParts([])
        self._states = LocalStates(self._parts)
        self._collected = Collected(getattr(optimizer, INIT_GROUP))
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
        optimizer = self._optimizer
        groups, state = optimizer.param_groups, optimizer.state
        if any(group.get("differentiable") for group in groups):
            return
        with DisableTorchFunctionSubclass():
            if not self._parts.are_those_of(groups):
                self._parts = LocalParts(groups)
                self._states = LocalStates(self._parts)
            if not (self._parts.can_step and self._states.take(state) and self._parts.take_gradients()):
                return
            local = [{**group, "params": own} for group, own in zip(groups, self._parts.groups, strict=True)]
            parts, sources = self._parts, (self._parts, self._states.seen)
            if not self._collected.begin(local, parts.gradients, parts.there, sources):
                parts.lend_gradients()
        self._whole = groups, state
        optimizer.param_groups, optimizer.state = local, self._states.local
        setattr(optimizer, INIT_GROUP, self._collected.collect)

    def leave(self) -> None:
        """The parameters are in their place again."""
        if self._whole is None:
            return
        optimizer = self._optimizer
        delattr(optimizer, INIT_GROUP)
        optimizer.param_groups, optimizer.state = self._whole
        self._whole = None
        self._collected.end()
        with DisableTorchFunctionSubclass():
            if not self._collected.holds:  # else the step made no states
                self._states.give_back(optimizer.state)
            self._parts.drop_gradients()
