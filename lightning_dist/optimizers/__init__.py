"""Optimizers over parameters of which a rank holds a part: asked whether they can, on small tensors, and set up."""

from lightning_dist.optimizers.local_step import step_over_local_parts
from lightning_dist.optimizers.trial import reads_the_loss, validate_exact

__all__ = ["reads_the_loss", "step_over_local_parts", "validate_exact"]
