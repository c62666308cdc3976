"""Which random numbers a part draws, and from which stream: those of its columns from one of this rank's own.

[Note: draws of a part]
The first run of each kind of module is compared with the whole (see [Note: parts are checked]); so are the shapes of
the random numbers that both draw. What has another shape is of this rank's heads, columns or positions, and has to come
from a stream of its own; what has the same shape is of what all ranks have, and has to come from the stream that they
share. Where a module draws for all before its first divided layer (dropout of its input, say), or calls its layers more
than once, its own stream begins whenever it calls the first. One that draws both kinds between the first and the last
is refused, as is one that draws for its columns elsewhere, or from a generator of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import nn

from lightning_dist.compat.torch import DropoutNd, children_of
from lightning_dist.logs.code_scan import is_library, scan_hook
from lightning_dist.parallel.rehearsal import Draw

_DRAWING = {
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "rrelu", "poisson"),
    *("bernoulli", "bernoulli_", "normal", "normal_", "log_normal_", "uniform_", "exponential_", "geometric_"),
    *("cauchy_", "random_", "gumbel_softmax", "multinomial", "sample", "rsample"),
    *("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm"),
}
"""Names of functions and methods."""


class Drawn(Enum):
    """What a kind of module was seen to draw while it runs on this rank's part."""

    NOTHING = auto()
    COLUMNS = auto()
    COLUMNS_LATER = auto()
    WHOLE = auto()
    UNKNOWN = auto()


class Draws:
    """What is known of a module's random numbers: what its first run told, and what it looks like.

    Args:
        module: whose layers and numbers are looked at, and the names in its forward: it may hold a probability itself.
    """

    def __init__(self, module: nn.Module) -> None:
        self.noted: Drawn | None = None
        """As a run of a module of its kind told. What is compiled is not seen to run."""
        self._may_draw = any(_looks_so(child) for child in module.modules())

    def now(self, module: nn.Module) -> bool:
        """Whether what the module's forward may draw is of its columns."""
        if self.noted in (None, Drawn.NOTHING) or torch.compiler.is_compiling():
            return self._may_draw and module.training  # a buffer, or an argument, may hold a probability that changes
        return self.begins or (self.noted is Drawn.UNKNOWN and module.training)

    @property
    def begins(self) -> bool:
        """Whether it was seen to draw for its columns."""
        return self.noted in (Drawn.COLUMNS, Drawn.COLUMNS_LATER)

    @property
    def is_later(self) -> bool:
        """Whether its own stream begins at its first divided layer."""
        return self.noted is Drawn.COLUMNS_LATER and not torch.compiler.is_compiling()

    @property
    def moves(self) -> bool:
        """Whether the shared stream goes on without regard to what a rank drew: alike, where that hangs on its part."""
        return self.begins


@dataclass(frozen=True)
class DrawnByRank:
    """What a module drew on a rank.

    Args:
        columns: for its columns.
        alike: for all, in a stream of this rank's own.
        before: for all in the shared stream, before it first did so for its columns.
        again: for its columns after its own stream had ended and begun anew.
        elsewhere: for its columns in the shared stream, or from another generator.
        is_unknown: it can't be told.
    """

    columns: bool = False
    alike: bool = False
    before: bool = False
    again: bool = False
    elsewhere: bool = False
    is_unknown: bool = False


def drawn(whole: Sequence[Draw], part: Sequence[Draw], is_unknown: bool) -> DrawnByRank:
    """What a module drew on this rank, see [Note: draws of a part].

    Args:
        whole, part: as it ran whole, and in part.
        is_unknown: operators ran of which nothing tells whether they draw.
    """
    if len(whole) != len(part):
        return DrawnByRank(is_unknown=True)
    pairs = list(zip(whole, part, strict=True))
    is_columns = [w.shape != p.shape for w, p in pairs]
    first = is_columns.index(True) if any(is_columns) else len(pairs)
    columns = [p for w, p in pairs if w.shape != p.shape]
    others = [(k, p) for k, (w, p) in enumerate(pairs) if w.shape == p.shape and not p.has_generator]
    return DrawnByRank(
        columns=bool(columns),
        alike=any(p.episode is not None for _, p in others),
        before=any(k < first and p.episode is None for k, p in others),
        again=any(p.episode is not columns[0].episode for p in columns),
        elsewhere=any(p.has_generator or p.episode is None for p in columns),
        is_unknown=is_unknown,
    )


def _looks_so(module: nn.Module) -> bool:
    if isinstance(module, (DropoutNd, nn.RReLU)):
        return not isinstance(module, DropoutNd) or module.p > 0
    numbers = (value for name, value in vars(module).items() if "drop" in name and isinstance(value, float))
    return any(value > 0 for value in numbers) or _calls(module)


def _calls(module: nn.Module) -> bool:
    """Whether its forward, or what this calls, names a function that draws.

    A layer or number that the module has under such a name is looked at by itself; libraries have their probabilities
    among their layers and numbers.
    """
    held = {**vars(module), **children_of(module)}
    words = {name: name for name in _DRAWING if not isinstance(held.get(name), (nn.Module, float, int))}
    return not is_library(type(module).__module__) and bool(scan_hook(module, "forward", words))
