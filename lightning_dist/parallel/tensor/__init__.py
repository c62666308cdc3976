"""The tensor axis: every rank holds its heads and columns of each layer, and sees the same samples.

``split`` divides a module by a plan; ``region`` runs its modules on this rank's part.
"""

from lightning_dist.parallel.tensor.hooks import validate_no_compiled_hooks
from lightning_dist.parallel.tensor.split import TensorAxis, split, unsplit_copy

__all__ = ["TensorAxis", "validate_no_compiled_hooks", "split", "unsplit_copy"]
