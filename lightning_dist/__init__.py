"""Train any LightningModule, unchanged, under any layout of data and model parallelism.

Importing this package registers the strategy ``"hybrid"`` with Lightning, for its Trainer and for Fabric::

    import lightning as L
    import lightning_dist

    L.Trainer(strategy="hybrid", devices=4)
    L.Fabric(strategy="hybrid", devices=4)
"""

import sys
from functools import partial
from typing import Any, NoReturn

from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

from lightning_dist.fabric import HybridFabricStrategy
from lightning_dist.layout import Layout
from lightning_dist.numbers import Spikes
from lightning_dist.report import PipelineTimeline, Throughput
from lightning_dist.strategy import HybridStrategy

__all__ = ["HybridFabricStrategy", "HybridStrategy", "Layout", "PipelineTimeline", "Spikes", "Throughput"]
__version__ = "0.1.0"

_DESCRIPTION = "any layout of data and model parallelism of an unmodified LightningModule"


def _refuse_twin(twin: str, kind: str, line: str, own: str, **_: Any) -> NoReturn:
    raise ValueError(
        f'strategy="hybrid" works with the package lightning, and this {kind} is of its twin {twin}, whose classes are '
        f"others; write `{line.format(own)}` in place of `{line.format(twin)}`"
    )


# LightningCLI hands the name of a class without init_args on as a string, and the Trainer writes it in lower case
_NAMES = (HybridStrategy.strategy_name, "hybridstrategy", "lightning_dist.hybridstrategy")
for _name in _NAMES:
    if _name not in StrategyRegistry:
        StrategyRegistry.register(_name, HybridStrategy, description=_DESCRIPTION)
if HybridFabricStrategy.strategy_name not in STRATEGY_REGISTRY:
    STRATEGY_REGISTRY.register(HybridFabricStrategy.strategy_name, HybridFabricStrategy, description=_DESCRIPTION)
_TWINS = {
    "pytorch_lightning": ("StrategyRegistry", "Trainer", "import {} as pl", "lightning.pytorch"),
    "lightning_fabric": ("STRATEGY_REGISTRY", "Fabric", "from {} import Fabric", "lightning"),
}
for _twin, (_registry, *_words) in _TWINS.items():
    if _twin in sys.modules:
        getattr(sys.modules[_twin].strategies, _registry).register(
            HybridStrategy.strategy_name, partial(_refuse_twin, _twin, *_words), description=_DESCRIPTION, override=True
        )
