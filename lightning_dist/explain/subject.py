"""What is explained: a class that the command line names, or a recipe of the project that it is run in."""

from __future__ import annotations

import importlib
import inspect
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import Strategy
from omegaconf import OmegaConf

TABLE, KEY = "lightning_dist", "recipes"
"""Names a project's recipes, a :data:`Recipes`: ``[tool.lightning_dist] recipes = "package.module:function"``."""


@dataclass(frozen=True)
class Subject:
    """A module and how it would be trained.

    Args:
        make: makes the module.
        strategy: that would train it.
        num_ranks: of the whole run.
        first_batch: for its training step, which cuts a pipeline; None to run its forward on ``example_input_array``.
        trainer: arguments of the Trainer that change what a step holds: its precision, micro-steps, clipping.
        data: makes the LightningDataModule that it would be trained on.
    """

    make: Callable[[], pl.LightningModule]
    strategy: Strategy
    num_ranks: int
    first_batch: Callable[[], Any] | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    data: Callable[[], pl.LightningDataModule] | None = None


Recipes = Callable[[list[str]], Subject]
"""Takes the arguments of a command line; raises ValueError where they describe nothing."""


def find_recipes(directory: Path) -> Recipes:
    """The recipes that the nearest ``pyproject.toml`` names, in the directory or above, see :data:`KEY`; a ValueError
    where none does, or what it names is not there.
    """
    return find_in_project(directory, KEY, ", or name a LightningModule as package.module:Class")


def find_in_project(directory: Path, key: str, or_else: str = "") -> Any:
    """What ``[tool.lightning_dist]`` of the nearest ``pyproject.toml`` names, in the directory or above.

    Args:
        directory: to begin in.
        key: of the table; its value is ``"package.module:name"``.
        or_else: what would do too, for the message where there is none.

    Raises:
        ValueError: there is none, or what it names is not there.
    """
    for project in (directory, *directory.parents):
        file = project / "pyproject.toml"
        if file.is_file() and (target := tomllib.loads(file.read_text()).get("tool", {}).get(TABLE, {}).get(key)):
            sys.path.insert(0, str(project))
            return _import(target, f"{key} of {file}")
    raise ValueError(
        f"no pyproject.toml in {directory} or above has [tool.{TABLE}] {key}: run in a clone of the repository{or_else}"
    )


@dataclass(frozen=True)
class Target:
    """Calls what ``"package.module:Class"``, or a function, names, with keyword arguments; other processes can too.

    Args:
        target: as a user typed it.
        arguments: by name.
        kind: what it has to give.
        purpose: for the error where it gives something else.
    """

    target: str
    arguments: Mapping[str, Any]
    kind: type = object
    purpose: str = ""

    def __call__(self) -> Any:
        """What it gives; a ValueError where that is of another kind."""
        made = self.found()(**self.arguments)
        if not isinstance(made, self.kind):
            raise ValueError(
                f"{self.target} gives a {type(made).__name__}; a {self.kind.__name__} is what can be {self.purpose}"
            )
        return made

    def found(self) -> Any:
        """The class or function; a ValueError where there is none."""
        return _import(self.target, self.target)

    def validate(self) -> Target:
        """This one; a ValueError where there is no such thing, or it wants other arguments."""
        try:
            inspect.signature(self.found()).bind(**self.arguments)
        except TypeError as error:
            raise ValueError(f"{self.target}: {error}; give its arguments as name=value") from None
        return self


def module_maker(
    target: str, arguments: Mapping[str, Any], purpose: str = "explained"
) -> Callable[[], pl.LightningModule]:
    """Makes the LightningModule that ``"package.module:Class"``, or a function, gives for keyword arguments; a
    ValueError where there is no such thing, or it wants other arguments.
    """
    return Target(target, arguments, pl.LightningModule, purpose).validate()


def _import(target: str, what: str) -> Any:
    path, _, name = target.partition(":")
    try:
        found: Any = importlib.import_module(path)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{what} can't be imported: {error}. Give it as package.module:Class") from None
    return found


def parse_arguments(arguments: list[str]) -> dict[str, Any]:
    """Values of ``name=value``, as Hydra reads them; a ValueError for an argument of another form."""
    for argument in arguments:
        if "=" not in argument:
            raise ValueError(f"{argument!r} is no name=value")
    values: Any = OmegaConf.to_container(OmegaConf.from_dotlist(arguments))
    return {str(name): value for name, value in values.items()}
