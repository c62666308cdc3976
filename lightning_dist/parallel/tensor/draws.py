"""Whether a part draws random numbers, which are this rank's own where its tensors are divided."""

from __future__ import annotations

import torch
from torch import nn

from lightning_dist.compat.torch import DropoutNd
from lightning_dist.logs.code_scan import is_library, scan_hook

_DRAWING = {
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "rrelu"),
    *("bernoulli", "bernoulli_", "normal", "normal_", "uniform_", "exponential_", "gumbel_softmax", "multinomial"),
    *("rand", "rand_like", "randn", "randn_like", "randint", "randint_like"),
}
"""Names of functions and methods."""


class Draws:
    """What is known of a module's random numbers: what its first run told, and until then what it looks like.

    Args:
        module: whose layers and numbers are looked at, and the names in its forward: it may hold a probability itself.
    """

    def __init__(self, module: nn.Module) -> None:
        self.noted: bool | None = None
        """As a run of a module of its kind told. What is compiled is not seen to run."""
        layers = any(isinstance(child, DropoutNd) and child.p > 0 for child in module.modules())
        numbers = (value for name, value in vars(module).items() if "drop" in name and isinstance(value, float))
        self._may_draw = layers or any(value > 0 for value in numbers) or any(map(_calls, module.modules()))

    def now(self, module: nn.Module) -> bool:
        """Whether the module's forward may draw."""
        if self.noted is None or torch.compiler.is_compiling():
            return self._may_draw and module.training
        return self.noted


def _calls(module: nn.Module) -> bool:
    """Whether its forward, or what this calls, names a function that draws.

    What the module itself has under such a name is looked at by itself; libraries have their probabilities among their
    layers and numbers.
    """
    words = {name: name for name in _DRAWING if not hasattr(module, name)}
    return not is_library(type(module).__module__) and bool(scan_hook(module, "forward", words))
