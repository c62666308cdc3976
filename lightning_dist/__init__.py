"""Train any LightningModule, unchanged, under any layout of data and model parallelism.

Importing this package registers the strategy ``"hybrid"`` with Lightning::

    import lightning as L
    import lightning_dist

    L.Trainer(strategy="hybrid", devices=4)
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_dist.layout import Layout
from lightning_dist.report import Throughput
from lightning_dist.strategy import HybridStrategy

__all__ = ["HybridStrategy", "Layout", "Throughput"]
__version__ = "0.1.0"

if HybridStrategy.strategy_name not in StrategyRegistry:
    StrategyRegistry.register(
        HybridStrategy.strategy_name,
        HybridStrategy,
        description="any layout of data and model parallelism of an unmodified LightningModule",
    )
