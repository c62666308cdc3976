"""Steps that optimise by hand, with one ``manual_backward``.

[Note: a manual step over microbatches]
Each microbatch runs the user's step with optimizers that do nothing; what it gives to ``manual_backward`` is the loss
that the schedule takes back through the stages. Then the step runs once more, for what it does beside the network: its
modules return what the trace recorded, tensors without memory, nothing is logged, ``manual_backward`` puts the
gradients of the schedule in place and reduces them, and optimizers are real. So ``zero_grad``, ``step``, clipping and
schedulers run once a step, in the order and under the conditions that the user wrote. What it logs of the network is
that of the microbatches; what it logs after ``manual_backward`` beside, that of the last run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_dist.patches import Patches
from lightning_dist.placeholder import is_placeholder, placeholder
from lightning_dist.pytree import tree_leaves

SEVERAL = (
    "pp runs the backward of a step in its schedule, and this training_step calls manual_backward {number} times; one "
    "loss a step can be trained under pp, or use another axis"
)


def refuse_toggling(*_: Any, **__: Any) -> None:
    """In place of what toggles an optimizer: other parameters would have gradients than in one process."""
    raise RuntimeError(
        "pp: a manual step toggles its optimizers, so other parameters would have gradients than in one process; "
        "freeze them in on_train_batch_start, or use another axis"
    )


def _nothing(*_: Any, **__: Any) -> None:
    return None


class IdleOptimizer:
    """Stands for an optimizer, or a scheduler, in a step that only computes; ``real`` is None before there is one."""

    toggle_model = refuse_toggling
    zero_grad = _nothing

    def __init__(self, real: Any) -> None:
        self.__dict__.update(_real=real)

    def step(self, closure: Any = None, **_: Any) -> None:
        """Does nothing; refuses a closure, which would run the network."""
        if closure is not None:
            raise RuntimeError(
                "pp: optimizer.step(closure) in a step that optimises manually would run the network inside of the "
                "optimizer; call manual_backward, then step(), or use another axis"
            )

    def __iter__(self) -> Iterator[Any]:
        """Where it is not known yet how many there are, there are none."""
        return iter([] if self._real is None else self._real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)


def idle(real: Any) -> Any:
    """Stands in for an optimizer, a scheduler or None, or for each in a list of them."""
    return [IdleOptimizer(one) for one in real] if isinstance(real, (list, tuple)) else IdleOptimizer(real)


IDLE = {"clip_gradients": _nothing, "toggle_optimizer": refuse_toggling, "untoggle_optimizer": refuse_toggling}
"""Methods of a LightningModule whose step only computes."""


@contextmanager
def _replaced(module: pl.LightningModule, **values: Any) -> Iterator[None]:
    with Patches() as patches:
        for name, value in values.items():
            patches.set(module, name, value)
        yield


def computing(module: pl.LightningModule, take: Callable[[Tensor], None]) -> AbstractContextManager[None]:
    """While it lasts, a step computes only; ``take`` is given what it gives to ``manual_backward``."""
    optimizers, schedulers = module.optimizers, module.lr_schedulers

    def taken(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:
            raise RuntimeError(
                f"pp: manual_backward with {', '.join([*map(str, args), *kwargs])}: the backward runs in the schedule, "
                "which takes the loss alone; pass nothing else, or use another axis"
            )
        take(loss)

    return _replaced(
        module,
        manual_backward=taken,
        optimizers=lambda *args, **kwargs: idle(optimizers(*args, **kwargs)),
        lr_schedulers=lambda: None if schedulers() is None else idle(schedulers()),
        **IDLE,
    )


def stepping(
    module: pl.LightningModule, loss: Tensor, logged: Callable[[str, Any], None]
) -> AbstractContextManager[None]:
    """While it lasts, a step does all but compute, and its ``manual_backward`` takes this loss.

    What it logs after that is given to ``logged``, if it does not come of activations: rates, norms of gradients.
    """
    backward, is_over = type(module).manual_backward, False

    def given(_: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal is_over
        backward(module, loss)
        is_over = True

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if is_over and not any(map(is_placeholder, tree_leaves(value))):
            logged(name, value)

    return _replaced(module, manual_backward=given, log=log)


class HiddenGradients:
    """While a microbatch runs, parameters have no gradients: those of others are not the step's to clip or read. After
    its ``manual_backward`` there are gradients without memory.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module
        self._there: dict[int, tuple[Any, Any]] = {}

    def __enter__(self) -> None:
        for parameter in self._module.parameters():  # what is gathered meanwhile is another
            if id(parameter) not in self._there:
                self._there[id(parameter)] = parameter, parameter.grad
                parameter.grad = None

    def show(self) -> None:
        """The step called ``manual_backward``."""
        self.__enter__()
        show_gradients(self._module)

    def __exit__(self, *_: object) -> None:
        for parameter, gradient in self._there.values():
            parameter.grad = gradient


def show_gradients(module: nn.Module) -> None:
    """Gives the parameters gradients without memory."""
    for parameter in module.parameters():
        parameter.grad = placeholder(parameter) if parameter.requires_grad else None
