"""What a step logs for each microbatch becomes what it would have logged for the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_dist.compat.torchmetrics import set_step_value, step_value
from lightning_dist.logs.metrics import MetricSnapshot
from lightning_dist.logs.reductions import REDUCTIONS, Reduction, reduction_of
from lightning_dist.patches import Patches
from lightning_dist.placeholder import is_placeholder
from lightning_dist.pytree import tree_leaves


@dataclass
class _Entry:
    """A name that a step logged, with what each microbatch gave."""

    kwargs: dict[str, Any]
    values: list[Any] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)

    @property
    def reduction(self) -> Reduction:
        return reduction_of(self.kwargs.get("reduce_fx", "mean"))


class RecordedLogs:
    """Wraps a module's ``log`` while microbatches run, and then logs each name once.

    A mean is that of the microbatches, weighted by their size (or the ``batch_size`` that was given); sums, minima and
    maxima are taken of them. Under ``reduce_fx="sum"``, a Python number that does not depend on the number of samples
    is a constant of the step, and counts once. The step value of a metric is the mean of its values.

    A stage logs, and updates metrics, from its entry to its exit only: what comes before ran on an earlier stage.

    Args:
        module: whose ``log`` it is.
        sizes: of the microbatches, by which means are weighted.
        is_constant: whether the number that is logged under a name is the same for fewer samples.
    """

    def __init__(self, module: pl.LightningModule, sizes: list[float], is_constant: Callable[[str], bool]) -> None:
        self._module, self._sizes, self._is_constant = module, sizes, is_constant
        self._logged: dict[str, _Entry] = {}
        self._index, self._active = 0, True
        self.has_logged = self.takes_unknown = False
        """Whether the microbatch that runs has logged; and may log what has no memory, to be replaced: of gradients."""
        self._metrics: MetricSnapshot | None = None
        """As it was when the microbatch began, where the step updates metrics before the entry."""

    def recording(self) -> Patches:
        """While it lasts, ``log`` notes."""
        patches = Patches()
        patches.set(self._module, "log", self._log)
        return patches

    def begin(self, index: int, active: bool, sees_metrics: bool) -> None:
        """A microbatch begins; ``active`` at its stage's entry. A step may update metrics before (``sees_metrics``)."""
        self._index, self._active, self.has_logged, self.takes_unknown = index, active, False, False
        if sees_metrics and not active:
            self._metrics = MetricSnapshot(self._module)

    def enter(self) -> None:
        """The microbatch is at its stage's entry: what metrics saw on the way there is another stage's."""
        self._active = True
        if self._metrics is not None:
            self._metrics.restore()
            self._metrics = None

    end = enter
    """The microbatch left its stage."""

    def _log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if not self._active:
            return
        self.has_logged = True
        if not self.takes_unknown and any(is_placeholder(leaf) for leaf in tree_leaves(value)):
            raise RuntimeError(
                f"pp: the step logs {name!r}, which comes of parameters or activations of another stage, by a way that "
                "is not seen (a hook's closure, a parameter that is read directly); log it in on_train_batch_end, "
                "return it from the module, or keep it in an attribute of the module that computes it"
            )
        kwargs.update(zip(("prog_bar", "logger", "on_step", "on_epoch"), args, strict=False))
        kwargs["rank_zero_only"] = False  # rank 0 may not run the stage that logs
        entry = self._logged.setdefault(name, _Entry(kwargs))
        if isinstance(value, Metric):
            cache = step_value(value)
            entry.values.append((value, cache.detach() if isinstance(cache, Tensor) else None))
        else:
            entry.values.append(value.detach() if isinstance(value, Tensor) else value)
        given = kwargs.get("batch_size")
        entry.sizes.append(self._sizes[self._index] if given is None else int(given))

    def replace(self, name: str, value: Any) -> None:
        """What was logged under a name in this stage is this."""
        if name in self._logged and not isinstance(value, Metric):
            self._logged[name].values, self._logged[name].sizes = [value], [1.0]

    def replay(self) -> None:
        """Logs what was noted, for the whole batch."""
        for name, entry in self._logged.items():
            kwargs = dict(entry.kwargs)
            if kwargs.get("batch_size") is not None:
                kwargs["batch_size"] = int(sum(entry.sizes))
            self._module.log(name, self._combined(name, entry), **kwargs)
        self._logged.clear()

    def values(self) -> dict[str, Any]:
        """What would be logged for the whole batch, but for metrics; forgets what was noted."""
        logged = {n: self._combined(n, e) for n, e in self._logged.items() if not isinstance(e.values[0], tuple)}
        self._logged.clear()
        return logged

    def _combined(self, name: str, entry: _Entry) -> Any:
        first, several = entry.values[0], len(entry.values) > 1
        is_number = several and entry.reduction.adds_up and not isinstance(first, (Tensor, tuple, dict))
        if is_number and all(value == first for value in entry.values) and self._is_constant(name):
            return first
        return _combined(entry)


def _combined(entry: _Entry) -> Any:
    first = entry.values[0]
    if isinstance(first, tuple):
        metric, caches = first[0], [cache for _, cache in entry.values]
        if all(cache is not None for cache in caches):
            set_step_value(metric, REDUCTIONS["mean"].combine(caches, entry.sizes))
        return metric
    if isinstance(first, dict):
        keys = first.keys()
        return {key: _combined(_Entry(entry.kwargs, [v[key] for v in entry.values], entry.sizes)) for key in keys}
    values = [v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in entry.values]
    joined = entry.reduction.combine(values, entry.sizes)
    return float(joined) if entry.reduction.is_weighted and not isinstance(first, Tensor) else joined
