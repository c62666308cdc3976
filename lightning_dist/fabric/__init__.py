"""The layouts for loops that users write themselves, with Lightning's Fabric."""

from lightning_dist.fabric.strategy import HybridFabricStrategy

__all__ = ["HybridFabricStrategy"]
