"""Running something for a look at what it gives: with fixed numbers for random ones, and with nothing left of it."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_dist.compat.operators import LIKE, arguments_of, name_of_operator
from lightning_dist.compat.torch import TorchDispatchMode
from lightning_dist.compat.torchmetrics import metric_state
from lightning_dist.logs.code_scan import is_library
from lightning_dist.logs.metrics import metrics_in
from lightning_dist.placeholder import is_placeholder
from lightning_dist.random_states import OwnStream


def is_users_object(value: Any) -> bool:
    """Whether it is of a class of the user's (a meter, a cache): no tensor, module or function."""
    if isinstance(value, (Tensor, nn.Module, type)) or callable(value) or not hasattr(value, "__dict__"):
        return False
    if type(value).__new__ is not object.__new__:
        return False  # such as a dictionary of a class of its own
    return not is_library(type(value).__module__)


@contextmanager
def undone(module: nn.Module, writes: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Puts back what a module changes meanwhile: buffers, attributes, what is in them, states of metrics; and the
    parameters that it ``writes`` to.
    """
    undo = undo_of(module, writes)
    try:
        yield
    finally:
        undo()


def undo_of(module: nn.Module, writes: Iterable[nn.Parameter] = ()) -> Callable[[], None]:
    """What puts all that :func:`undone` names back to how it is now."""
    kept = [_Attributes(child) for child in module.modules()]
    tensors = [*(b for b in module.buffers() if not is_placeholder(b)), *writes]
    values = [tensor.detach().clone() for tensor in tensors]
    states = [(m, {k: copy.copy(v) for k, v in metric_state(m).values.items()}) for m in metrics_in(module)]

    def undo() -> None:
        for attributes in kept:
            attributes.restore()
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                if not torch.equal(tensor, value):
                    tensor.detach().copy_(value)
        for metric, state in states:
            for name, before in state.items():
                setattr(metric, name, before)

    return undo


class _Attributes:
    """What a module has under its names, and what is in the containers there."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._before = module, dict(vars(module))
        objects = [vars(v) for v in self._before.values() if is_users_object(v)]
        held = [*self._before.values(), *objects, *(item for values in objects for item in values.values())]
        kinds = (list, dict, set, OrderedDict, defaultdict, deque)
        self._contents = [(v, copy.copy(v)) for v in held if type(v) in kinds]

    def restore(self) -> None:
        own = vars(self._module)
        for container, before in self._contents:
            if isinstance(container, (list, deque)):
                if len(container) != len(before) or any(x is not y for x, y in zip(container, before, strict=True)):
                    container.clear()
                    container.extend(before)
            elif container != before if isinstance(container, set) else not _same_items(container, before):
                container.clear()
                container.update(before)
        for name in [name for name in own if name not in self._before]:
            del own[name]
        own.update(self._before)


def _same_items(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return list(one) == list(other) and all(one[key] is other[key] for key in one)


class FixedNumbers(TorchDispatchMode):
    """While it lasts, random operations give numbers that depend on their arguments only, alike for every sample."""

    running: ClassVar[list[FixedNumbers]] = []
    """Those that last now: something runs for a look at what it gives."""

    def __enter__(self) -> Any:
        self.running.append(self)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.running.remove(self)
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        given = _given(func, args, kwargs)
        name = name_of_operator(func).partition("::")[2].rstrip("_").removesuffix(LIKE)
        if "dropout_p" in given:  # attention: the same without it
            return func(**{**given, "dropout_p": 0.0}) if given["dropout_p"] else func(*args, **kwargs)
        if name == "native_dropout":
            return given["input"].clone(), torch.ones_like(given["input"], dtype=torch.bool)
        generator = given.get("generator")
        state = None if generator is None else generator.get_state()
        output = func(*args, **kwargs)
        if generator is not None:
            generator.set_state(state)
        if isinstance(output, Tensor):
            fixed = _fixed(name, output, given)
            if isinstance(fixed, Tensor):
                output.copy_(fixed.expand_as(output))
            else:
                output.fill_(fixed)
        return output


@dataclass(frozen=True)
class Draw:
    """Random numbers that were drawn: their shape, in which episode of a stream of the rank's own (None: in the shared
    one), and whether from a generator that was given."""

    shape: tuple[int, ...]
    episode: object
    has_generator: bool


class DrawsNoted(TorchDispatchMode):
    """While it lasts, notes which random numbers are drawn, in their order, and whether others' operators run, of which
    nothing tells whether they draw."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Draw] = []
        self.is_unknown = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self.is_unknown |= name_of_operator(func).lstrip("_").partition("::")[0] not in _KNOWN
        if torch.Tag.nondeterministic_seeded in func.tags and not OwnStream.is_seeding:
            given = _given(func, args, kwargs)
            is_attention = any(argument.name == "dropout_p" for argument in arguments_of(func))
            numbers = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(numbers, Tensor) and (not is_attention or given.get("dropout_p")):
                episode = OwnStream.open[-1].episode if OwnStream.open else None
                self.draws.append(Draw(tuple(numbers.shape), episode, given.get("generator") is not None))
        return output


_KNOWN = {"aten", "prim", "prims", "c10d", "c10d_functional", "c10d_functional_autograd", "fsdp", "torchvision"}
"""Namespaces whose operators say so if they draw, without what they begin with (``_c10d_functional``)."""


def _given(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an operator's call, by name."""
    return {**dict(zip((argument.name for argument in arguments_of(func)), args, strict=False)), **kwargs}


def _fixed(name: str, output: Tensor, given: dict[str, Any]) -> Any:
    """What a random operation gives: one number for all elements, or a tensor that its output can be filled with."""
    if name == "uniform":
        return (float(given.get("from", 0.0)) + float(given.get("to", 1.0))) / 2
    if name in ("normal", "normal_functional"):
        return given.get("mean", 0.0) + 0.5 * given.get("std", 1.0)
    if name == "bernoulli":
        p = given.get("p", given["self"] if given.get("p") is None and output is not given.get("self") else 0.5)
        return torch.as_tensor(p, device=output.device).ge(0.5)
    if name in ("randint", "random"):
        low, high = given.get("low", given.get("from", 0)), given.get("high", given.get("to"))
        return 0 if high is None else (int(low or 0) + int(high)) // 2
    if name == "randperm":
        return torch.arange(output.numel(), device=output.device)
    if name == "multinomial":
        best = given["self"].argsort(stable=True, dim=-1, descending=True)
        return best[..., :1] if given.get("replacement") else best[..., : output.shape[-1]]
    return 0.5 if output.is_floating_point() else 1
