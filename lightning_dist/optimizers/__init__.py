"""Optimizers over parameters of which a rank holds a part: asked whether they can, on small tensors, and set up."""

from lightning_dist.optimizers.trial import choose_kernels, reads_the_loss, validate_exact

__all__ = ["choose_kernels", "reads_the_loss", "validate_exact"]
