"""A module that the user compiled whole: ``trainer.fit(torch.compile(module))``."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.compile import to_uncompiled

from lightning_dist.compat import lightning as private
from lightning_dist.layout import Layout

_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


class CompiledModule:
    """Takes the compiled steps off a module until it has been set up.

    Lightning puts them onto the module and refuses them for strategies that are not its own, before it asks those; so
    they are off from the moment that the strategy gets the module.

    Args:
        module: whose steps are compiled.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._context: dict[str, Any] = dict(private.compiled_steps(module) or {})
        self._module = to_uncompiled(module)

    @staticmethod
    def compiles(module: Any) -> bool:
        """Whether the steps of a module are compiled."""
        return private.compiled_steps(module) is not None

    def validate(self, layout: Layout | None) -> None:
        """Raises where steps are run in parts.

        Raises:
            ValueError: parameters are divided.
        """
        if layout is not None and layout.holds_shards:
            raise ValueError(
                f"torch.compile of the whole LightningModule under layout {layout}: a rank holds parts of what it "
                "would compile; pass the module itself, and HybridStrategy(compile=True), which compiles its blocks"
            )

    def put_back(self) -> None:
        """Compiles the steps again, as the user did."""
        private.compile_steps(self._module, _STEPS, self._context)
