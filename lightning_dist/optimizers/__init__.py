"""Optimizers over parameters of which a rank holds a part: asked whether they can, on small tensors, and set up."""

from lightning_dist.optimizers.settings import choose_kernels, reads_the_loss
from lightning_dist.optimizers.trial import refuse_inexact

__all__ = ["choose_kernels", "reads_the_loss", "refuse_inexact"]
