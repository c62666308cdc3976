"""Guards of a trace: what a step asked beside its batch (the epoch, the batch's number, attributes that hooks set).

[Note: a path that changes]
A step may run other modules in another epoch (``if self.current_epoch > 2``), for every second batch, or where a hook
has set a flag. The trace of such a step holds as long as the answers do that it was given. So the fake module is given
numbers that note which questions were asked of them (``> 2``, ``% 2 == 0``) with the answers: guards. Where a later
step would be answered otherwise, it is traced anew, on all ranks alike.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from lightning.pytorch.loggers.logger import DummyLogger

AddGuard = Callable[[Callable[[], Any], Any], None]
"""Called with a question to ask again, and the answer that was given."""


class GuardedInt(int):
    """An integer that notes what is asked of it, and of what is computed of it; ``get`` gives the present value."""

    _get: Callable[[], int]
    _add_guard: AddGuard

    def __new__(cls, get: Callable[[], int], add_guard: AddGuard) -> GuardedInt:
        made = super().__new__(cls, get())
        made._get, made._add_guard = get, add_guard
        return made

    def _ask(self, question: Callable[[int], Any]) -> Any:
        get, answer = self._get, question(self._get())
        self._add_guard(lambda: question(get()), answer)
        return answer

    def _computed(self, function: Callable[[int], Any]) -> Any:
        get = self._get
        value = function(get())
        return GuardedInt(lambda: function(get()), self._add_guard) if type(value) is int else self._ask(function)

    def __hash__(self) -> int:
        return hash(self._ask(operator.index))

    def __format__(self, spec: str) -> str:
        return format(self._ask(operator.index), spec)

    def __reduce__(self) -> Any:
        return int, (self._get(),)

    def __deepcopy__(self, _: Any) -> int:
        return self._get()


def _plain(value: Any) -> Any:
    return value._get() if isinstance(value, GuardedInt) else value


def _method(name: str, is_reflected: bool) -> Callable[[GuardedInt, Any], Any]:
    function = getattr(operator, name)

    def method(self: GuardedInt, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented

        def result(value: int) -> Any:
            return function(_plain(other), value) if is_reflected else function(value, _plain(other))

        return self._computed(result)

    return method


def _question(question: Callable[[int], Any]) -> Callable[[GuardedInt], Any]:
    def method(self: GuardedInt) -> Any:
        return self._ask(question)

    return method


for _kind in (bool, operator.index, int, float, repr, str):
    setattr(GuardedInt, f"__{_kind.__name__}__", _question(_kind))
_ARITHMETIC = ("add", "sub", "mul", "mod", "floordiv", "truediv", "pow", "and", "or", "xor", "lshift", "rshift")
for _name in ("lt", "le", "gt", "ge", "eq", "ne", *_ARITHMETIC):
    setattr(GuardedInt, f"__{_name}__", _method(f"__{_name}__", False))
for _name in _ARITHMETIC:
    setattr(GuardedInt, f"__r{_name}__", _method(f"__{_name}__", True))


class GuardedTrainer:
    """Stands for a Trainer, and notes which of its plain values are read; a step that asks may not log by itself."""

    def __init__(self, trainer: Any, add_guard: AddGuard, in_step: bool) -> None:
        self.__dict__.update(_trainer=trainer, _add_guard=add_guard, _in_step=in_step)

    @property
    def logger(self) -> Any:
        logger = getattr(self._trainer, "logger", None)
        return logger if logger is None else _Logger(logger, self._in_step)

    @property
    def loggers(self) -> list[Any]:
        return [_Logger(logger, self._in_step) for logger in getattr(self._trainer, "loggers", [])]

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._trainer)

    def __getattr__(self, name: str) -> Any:
        trainer, add_guard = self._trainer, self._add_guard
        value = getattr(trainer, name)
        if type(value) is int:
            return GuardedInt(lambda: getattr(trainer, name), add_guard)
        if isinstance(value, (bool, str, float)):
            add_guard(lambda: getattr(trainer, name), value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._trainer, name, value)


class _Logger(DummyLogger):
    """Stands for a logger: where it writes can be asked."""

    def __init__(self, logger: Any, in_step: bool) -> None:
        super().__init__()
        self._logger, self._in_step = logger, in_step

    def __getattribute__(self, name: str) -> Any:
        if name in ("name", "version", "save_dir", "root_dir", "log_dir"):
            return getattr(object.__getattribute__(self, "_logger"), name)
        if not name.startswith("_") and object.__getattribute__(self, "_in_step"):
            raise RuntimeError(
                f"pp: a step calls {name} of its logger: each of its microbatches would, on the first rank only, which "
                "may not have the stage; use self.log, or the logger in on_train_batch_end, where what the step "
                "returned is on every rank"
            )
        return object.__getattribute__(self, name)


def flags_of(module: Any) -> tuple[Any, ...]:
    """Flags and names among the attributes of all parts of a module, which hooks may set and a step look at."""
    attributes = (item for child in module.modules() for item in vars(child).items())
    return tuple(value for key, value in attributes if type(value) in (bool, str, type(None)) and key[0] != "_")
