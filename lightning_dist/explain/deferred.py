"""A module with its network, but without memory for its values."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_dist.initialization import CannotDefer, record_initialization


def build_deferred(make: Callable[[], pl.LightningModule]) -> pl.LightningModule:
    """Makes a module and its network: parameters on meta where that can be, buffers with their values.

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
