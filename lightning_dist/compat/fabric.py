"""Private names of Lightning's Fabric."""

from __future__ import annotations

from lightning.fabric.strategies.strategy import _apply_filter as apply_filter  # noqa: F401
from lightning.fabric.strategies.strategy import _validate_keys_for_strict_loading as validate_keys  # noqa: F401
from lightning.fabric.utilities.types import _Stateful as Stateful  # noqa: F401

from lightning_dist.compat.names import hands_on

hands_on("lightning.fabric.strategies.strategy._apply_filter", "leaves out of a checkpoint what fabric.save says")
hands_on("lightning.fabric.strategies.strategy._validate_keys_for_strict_loading", "refuses what Fabric does")
hands_on("lightning.fabric.utilities.types._Stateful", "knows what has a state_dict")
