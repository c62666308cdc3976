"""What a layout would do to a module, without training and without other processes: ``lightning-dist explain``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import OmegaConf

from lightning_dist.initialization import CannotDefer, record_initialization


def built(make: Callable[[], pl.LightningModule]) -> pl.LightningModule:
    """A module with its network, without memory for its values where that can be.

    Args:
        make: makes the module; its ``configure_model`` is called.
    """

    def build() -> pl.LightningModule:
        module = make()
        if is_overridden("configure_model", module):
            module.configure_model()
        return module

    try:
        with record_initialization() as recorded:
            module = build()
        if any(buffer.is_meta for buffer in module.buffers()):
            recorded.bind(module)
            recorded.materialize(module, parameters=False)  # a pipeline is cut by running it, with buffers for real
        return module
    except CannotDefer:
        return build()


def imported(target: str, arguments: Mapping[str, Any]) -> Callable[[], pl.LightningModule]:
    """Makes the LightningModule that a class or function of a module on the import path gives.

    Args:
        target: ``"package.module:Class"``.
        arguments: keyword arguments.

    Raises:
        ValueError: there is no such thing, or it wants other arguments.
    """
    path, _, name = target.partition(":")
    try:
        found: Any = importlib.import_module(path)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{target} can't be imported: {error}. Give it as package.module:Class") from None
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


def parsed(arguments: list[str]) -> dict[str, Any]:
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
