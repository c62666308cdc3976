"""The register of private names of other projects: what each is used for, and the version it was seen in."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

SEEN_IN = {
    "torch": "2.14.1",
    "lightning": "2.6.6",
    "torchmetrics": "1.9.0",
    "transformers": "5.24.0",
    "litdata": "0.2.76",
}
"""The versions whose private names were read."""


@dataclass(frozen=True)
class PrivateName:
    """A name that its project may take away.

    Args:
        path: dotted, from the package: ``"torch.distributed.tensor.DTensor._local_tensor"``.
        purpose: what it is used for, one sentence.
        user: of this package, what stands on it.
    """

    path: str
    purpose: str
    user: str

    @property
    def seen_in(self) -> str:
        """The version in which it was read."""
        return SEEN_IN[self.path.partition(".")[0]]

    def is_there(self) -> bool:
        """Whether the installed release has it: as an attribute of its module or class, or set on instances of it."""
        names = self.path.split(".")
        for length in range(len(names), 0, -1):
            try:
                found: Any = importlib.import_module(".".join(names[:length]))
            except ImportError:
                continue
            break
        else:
            return False
        for name in names[length:]:
            if not hasattr(found, name):
                return inspect.isclass(found) and any(is_set_by(kind, name) for kind in found.__mro__)
            found = getattr(found, name)
        return True

    def __str__(self) -> str:
        """The sentence that a failing test shows."""
        return f"{self.path} (seen in {self.seen_in}) is gone; {self.user} used it: {self.purpose}"


REGISTER: list[PrivateName] = []


def uses(*paths: str) -> Callable[[F], F]:
    """Registers the private names that a function or class stands on; its docstring says what for."""

    def register(user: F) -> F:
        purpose = inspect.cleandoc(user.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
        REGISTER.extend(PrivateName(path, purpose, user.__qualname__) for path in paths)
        return user

    return register


def hands_on(purposes: dict[str, str]) -> None:
    """Registers, by path, what private names are for that a file of ``compat`` imports for others, or names to them."""
    REGISTER.extend(PrivateName(path, purpose, path.rpartition(".")[2]) for path, purpose in purposes.items())


def name_of(path: str, purpose: str) -> str:
    """Registers a private name, and gives its last part: of a method that is patched, say."""
    hands_on({path: purpose})
    return path.rpartition(".")[2]


def getter(path: str, purpose: str, *absent: Any) -> Callable[[Any], Any]:
    """Registers a private attribute, and gives the function that reads it of an object.

    Args:
        path, purpose: as of :class:`PrivateName`.
        absent: what is read of an object without it, if that is no error.
    """
    name = name_of(path, purpose)

    def read(owner: Any) -> Any:
        return getattr(owner, name, *absent)

    return read


def setter(path: str, purpose: str) -> Callable[..., None]:
    """Registers a private attribute, and gives the function that sets it: of an object, to a value or to None."""
    name = name_of(path, purpose)

    def write(owner: Any, value: Any = None) -> None:
        setattr(owner, name, value)

    return write


def method(path: str, purpose: str) -> Callable[..., Any]:
    """Registers a private method, and gives the function that calls it: of an object, with arguments."""
    name = name_of(path, purpose)

    def call(owner: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(owner, name)(*args, **kwargs)

    return call


def is_set_by(kind: type, name: str) -> bool:
    """Whether a method of the class sets this attribute of its instance, or the class annotates it."""
    if name in getattr(kind, "__annotations__", {}):
        return True
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError):
        return False
    nodes = list(ast.walk(tree))
    stored = {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    literal = {n.value for n in nodes if isinstance(n, ast.Constant)}  # super().__setattr__("_parameters", ...)
    return name in stored | literal
