"""What is known of model families, so that no user has to change a module."""

from lightning_dist.plans.blocks import find_blocks, select_blocks

__all__ = ["find_blocks", "select_blocks"]
