"""What a step logs for each microbatch becomes what it would have logged for the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_dist.logs.metrics import metrics_in
from lightning_dist.placeholder import is_placeholder
from lightning_dist.pytree import tree_leaves


@dataclass
class Logged:
    """A name that a step logged, with what each microbatch gave."""

    kwargs: dict[str, Any]
    values: list[Any] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)


class RecordedLogs:
    """Stands before a module's ``log`` while microbatches run, and then logs each name once.

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
        self._logged: dict[str, Logged] = {}
        self._index = 0
        self._active = True
        self.has_logged = False
        """Whether the microbatch that runs has logged."""
        self.takes_unknown = False
        """Whether what it logs may be without memory, to be replaced: of gradients that are not there yet."""
        self._kept: list[tuple[Metric, dict[str, Any], int, Any]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While it lasts, ``log`` notes."""
        before = vars(self._module).get("log")
        vars(self._module)["log"] = self._log
        try:
            yield
        finally:
            if before is None:
                del vars(self._module)["log"]
            else:
                vars(self._module)["log"] = before

    def begin(self, index: int, active: bool, sees_metrics: bool) -> None:
        """A microbatch begins.

        Args:
            index: of the microbatch.
            active: whether it begins at its stage's entry.
            sees_metrics: whether the step updates metrics before the entry.
        """
        self._index, self._active, self.has_logged, self.takes_unknown = index, active, False, False
        if sees_metrics and not active:
            self._kept = [
                (m, m._copy_state_dict(), m._update_count, m._forward_cache) for m in metrics_in(self._module)
            ]

    def enter(self) -> None:
        """The microbatch is at its stage's entry: what metrics saw on the way there is another stage's."""
        self._active = True
        for metric, state, update_count, forward_cache in self._kept:
            for name, before in state.items():
                setattr(metric, name, before)
            metric._update_count, metric._forward_cache = update_count, forward_cache
        self._kept = []

    def end(self) -> None:
        """The microbatch left its stage."""
        self.enter()

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
        entry = self._logged.setdefault(name, Logged(kwargs))
        if isinstance(value, Metric):
            cache = getattr(value, "_forward_cache", None)
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

    def _combined(self, name: str, entry: Logged) -> Any:
        first = entry.values[0]
        is_number = not isinstance(first, (Tensor, tuple, dict))
        alike = is_number and all(value == first for value in entry.values)
        if len(entry.values) > 1 and alike and _reduction(entry) == "sum" and self._is_constant(name):
            return first
        return _combined(entry)


def _reduction(entry: Logged) -> str:
    reduce_fx = entry.kwargs.get("reduce_fx", "mean")
    return reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "mean")


def _combined(entry: Logged) -> Any:
    first = entry.values[0]
    if isinstance(first, tuple):
        metric, caches = first[0], [cache for _, cache in entry.values]
        if all(cache is not None for cache in caches):
            metric._forward_cache = _mean(caches, entry.sizes)
        return metric
    if isinstance(first, dict):
        keys = first.keys()
        return {key: _combined(Logged(entry.kwargs, [v[key] for v in entry.values], entry.sizes)) for key in keys}
    name = _reduction(entry)
    values = [v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in entry.values]
    if name == "sum":
        return torch.stack(values).sum(0)
    if name in ("min", "max"):
        return getattr(torch.stack(values), f"a{name}")(0)
    mean = _mean(values, entry.sizes)
    return mean if isinstance(first, Tensor) else float(mean)


def _mean(values: list[Tensor], sizes: list[float]) -> Tensor:
    if len(values) == 1:
        return values[0]
    total = sum(sizes)
    if not total:
        return values[-1]
    wide = sum(v.double() * (size / total) for v, size in zip(values, sizes, strict=True) if size)
    assert isinstance(wide, Tensor)
    return wide.to(values[0].dtype) if values[0].is_floating_point() else wide.float()
