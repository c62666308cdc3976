"""Train any LightningModule, unchanged, under any layout of data and model parallelism.

Importing this package registers the strategy ``"hybrid"`` with Lightning, for its Trainer and for Fabric::

    import lightning as L
    import lightning_dist

    L.Trainer(strategy="hybrid", devices=4)
    L.Fabric(strategy="hybrid", devices=4)
"""

import sys
from typing import Any, NoReturn

from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

from lightning_dist.fabric import HybridFabricStrategy
from lightning_dist.layout import Layout
from lightning_dist.report import PipelineTimeline, Throughput
from lightning_dist.strategy import HybridStrategy

__all__ = ["HybridFabricStrategy", "HybridStrategy", "Layout", "PipelineTimeline", "Throughput"]
__version__ = "0.1.0"

_DESCRIPTION = "any layout of data and model parallelism of an unmodified LightningModule"


def _refuse_twin(**_: Any) -> NoReturn:
    raise ValueError(
        'strategy="hybrid" works with the package lightning, and this Trainer is of its twin pytorch_lightning, whose '
        "classes are others; write `import lightning.pytorch as pl` in place of `import pytorch_lightning as pl`"
    )


def _refuse_twin_fabric(**_: Any) -> NoReturn:
    raise ValueError(
        'strategy="hybrid" works with the package lightning, and this Fabric is of its twin lightning_fabric, whose '
        "classes are others; write `from lightning import Fabric` in place of `from lightning_fabric import Fabric`"
    )


# LightningCLI hands the name of a class without init_args on as a string, and the Trainer writes it in lower case
_NAMES = (HybridStrategy.strategy_name, "hybridstrategy", "lightning_dist.hybridstrategy")
for _name in _NAMES:
    if _name not in StrategyRegistry:
        StrategyRegistry.register(_name, HybridStrategy, description=_DESCRIPTION)
if HybridFabricStrategy.strategy_name not in STRATEGY_REGISTRY:
    STRATEGY_REGISTRY.register(HybridFabricStrategy.strategy_name, HybridFabricStrategy, description=_DESCRIPTION)
if "pytorch_lightning" in sys.modules:
    sys.modules["pytorch_lightning"].strategies.StrategyRegistry.register(
        HybridStrategy.strategy_name, _refuse_twin, description=_DESCRIPTION, override=True
    )
if "lightning_fabric" in sys.modules:
    sys.modules["lightning_fabric"].strategies.STRATEGY_REGISTRY.register(
        HybridFabricStrategy.strategy_name, _refuse_twin_fabric, description=_DESCRIPTION, override=True
    )
