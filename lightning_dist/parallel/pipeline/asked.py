"""What a step asks while it is traced, beside its batch: the epoch, the number of the batch, attributes that hooks set.

[Note: a path that changes]
A step may run other modules in another epoch (``if self.current_epoch > 2``), for every second batch, or where a hook
has set a flag. The trace of such a step holds as long as the answers do that it was given. So the skeleton is given
numbers that note which questions were asked of them (``> 2``, ``% 2 == 0``) with the answers; where a later step would
be answered otherwise, it is traced anew, on all ranks alike.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from lightning.pytorch.loggers.logger import DummyLogger

Note = Callable[[Callable[[], Any], Any], None]
"""Called with a question to ask again, and the answer that was given."""


class AskedInt(int):
    """An integer that notes what is asked of it, and of what is computed of it.

    Args:
        get: gives the present value.
        note: is told of each question.
    """

    _get: Callable[[], int]
    _note: Note

    def __new__(cls, get: Callable[[], int], note: Note) -> AskedInt:
        made = super().__new__(cls, get())
        made._get, made._note = get, note
        return made

    def _asked(self, question: Callable[[int], Any]) -> Any:
        get, answer = self._get, question(self._get())
        self._note(lambda: question(get()), answer)
        return answer

    def _computed(self, function: Callable[[int], Any]) -> Any:
        get = self._get
        value = function(get())
        return AskedInt(lambda: function(get()), self._note) if type(value) is int else self._asked(function)

    def __bool__(self) -> bool:
        return self._asked(bool)

    def __hash__(self) -> int:
        return hash(self._asked(operator.index))

    def __index__(self) -> int:
        return self._asked(operator.index)

    __int__ = __index__

    def __float__(self) -> float:
        return self._asked(float)

    def __repr__(self) -> str:
        return repr(self._asked(operator.index))

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(self._asked(operator.index), spec)

    def __reduce__(self) -> Any:
        return int, (self._get(),)

    def __deepcopy__(self, _: Any) -> int:
        return self._get()


def _compared(name: str) -> Callable[[AskedInt, Any], Any]:
    function = getattr(operator, name)

    def method(self: AskedInt, other: Any) -> Any:
        return (
            self._asked(lambda value: function(value, _plain(other)))
            if isinstance(other, (int, float))
            else NotImplemented
        )

    return method


def _calculated(name: str, is_reflected: bool) -> Callable[[AskedInt, Any], Any]:
    function = getattr(operator, name)

    def method(self: AskedInt, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        return self._computed(
            (lambda value: function(_plain(other), value))
            if is_reflected
            else (lambda value: function(value, _plain(other)))
        )

    return method


def _plain(value: Any) -> Any:
    return value._get() if isinstance(value, AskedInt) else value


for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(AskedInt, f"__{_name}__", _compared(f"__{_name}__"))
for _name in ("add", "sub", "mul", "mod", "floordiv", "truediv", "pow", "and", "or", "xor", "lshift", "rshift"):
    setattr(AskedInt, f"__{_name}__", _calculated(f"__{_name}__", False))
    setattr(AskedInt, f"__r{_name}__", _calculated(f"__{_name}__", True))


class AskedTrainer:
    """Stands for a Trainer, and notes which of its plain values are read.

    Args:
        trainer: whose they are; its loggers take nothing.
        note: is told of each.
        in_step: whether a step asks, which may not log by itself.
    """

    def __init__(self, trainer: Any, note: Note, in_step: bool) -> None:
        self.__dict__.update(_trainer=trainer, _note=note, _in_step=in_step)

    @property
    def logger(self) -> Any:
        """None where the Trainer has none."""
        logger = getattr(self._trainer, "logger", None)
        return logger if logger is None else _Logger(logger, self._in_step)

    @property
    def loggers(self) -> list[Any]:
        """All of them."""
        return [_Logger(logger, self._in_step) for logger in getattr(self._trainer, "loggers", [])]

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._trainer)

    def __getattr__(self, name: str) -> Any:
        trainer, note = self._trainer, self._note
        value = getattr(trainer, name)
        if type(value) is int:
            return AskedInt(lambda: getattr(trainer, name), note)
        if isinstance(value, (bool, str, float)):
            note(lambda: getattr(trainer, name), value)
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


def attributes(module: Any) -> tuple[Any, ...]:
    """Flags and names among the attributes of all parts of a module, which hooks may set and a step look at."""
    kinds = (bool, str, type(None))
    return tuple(
        [
            value
            for child in module.modules()
            for key, value in vars(child).items()
            if type(value) in kinds and key[0] != "_"
        ]
    )
