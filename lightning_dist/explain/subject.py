"""What is explained: a class that the command line names, or a recipe of the project that it is run in."""

from __future__ import annotations

import importlib
import inspect
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
        first_batch: gives a batch for its training step, by which a pipeline is cut; None to run its forward on its
            ``example_input_array``.
    """

    make: Callable[[], pl.LightningModule]
    strategy: Strategy
    num_ranks: int
    first_batch: Callable[[], Any] | None = None


Recipes = Callable[[list[str]], Subject]
"""Takes the arguments of a command line; raises ValueError where they describe nothing."""


def find_recipes(directory: Path) -> Recipes:
    """The recipes that the nearest ``pyproject.toml`` names, in the directory or above; see :data:`KEY`.

    Raises:
        ValueError: none does, or what it names is not there.
    """
    for project in (directory, *directory.parents):
        file = project / "pyproject.toml"
        if file.is_file() and (target := tomllib.loads(file.read_text()).get("tool", {}).get(TABLE, {}).get(KEY)):
            sys.path.insert(0, str(project))
            return import_object(target, f"{KEY} of {file}")
    raise ValueError(
        f"no pyproject.toml in {directory} or above has [tool.{TABLE}] {KEY}: run in a clone of the repository, or "
        "name a LightningModule as package.module:Class"
    )


def module_maker(target: str, arguments: Mapping[str, Any]) -> Callable[[], pl.LightningModule]:
    """Makes the LightningModule that a class or function on the import path gives.

    Args:
        target: ``"package.module:Class"``.
        arguments: keyword arguments.

    Raises:
        ValueError: there is no such thing, or it wants other arguments.
    """
    found = import_object(target, target)
    try:
        inspect.signature(found).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{target}: {error}; give its arguments as name=value") from None

    def make() -> pl.LightningModule:
        module = found(**arguments)
        if not isinstance(module, pl.LightningModule):
            raise ValueError(f"{target} gives a {type(module).__name__}; a LightningModule is what can be explained")
        return module

    return make


def import_object(target: str, what: str) -> Any:
    """Imports ``"package.module:name"``.

    Args:
        target: the name.
        what: for the error.

    Raises:
        ValueError: there is no such thing.
    """
    path, _, name = target.partition(":")
    try:
        found: Any = importlib.import_module(path)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{what} can't be imported: {error}. Give it as package.module:Class") from None
    return found


def parse_arguments(arguments: list[str]) -> dict[str, Any]:
    """Values of ``name=value``, as Hydra reads them.

    Raises:
        ValueError: one that is not of that form.
    """
    for argument in arguments:
        if "=" not in argument:
            raise ValueError(f"{argument!r} is no name=value")
    values = OmegaConf.to_container(OmegaConf.from_dotlist(arguments))
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items()}
