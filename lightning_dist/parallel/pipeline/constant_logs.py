"""Numbers that a step logs whatever its batch: seen in traces of some samples."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from lightning_dist.parallel.pipeline.batch_split import Splitter
from lightning_dist.parallel.pipeline.fake_module import FakeModule
from lightning_dist.parallel.pipeline.tracing import trace_step
from lightning_dist.random_states import kept_random_states


class ConstantLogs:
    """Which names a step logs the same Python number under, for another number of samples.

    Args:
        module: whose steps they are.
        fake_module: that is traced.
        splitter: of batches.
        device: of this rank.
    """

    def __init__(
        self, module: pl.LightningModule, fake_module: FakeModule, splitter: Splitter, device: torch.device
    ) -> None:
        self._module, self._fake, self._splitter, self._device = module, fake_module, splitter, device
        self._known: dict[tuple[str, str], bool] = {}

    def has(self, step: str, batch: Any, others: tuple[Any, ...], name: str) -> bool:
        """Whether the step, on a batch and with its other arguments, logs a constant under a name."""
        if (step, name) not in self._known:
            logged = []
            with kept_random_states(self._device):
                for count in (1, 2):
                    part = self._splitter.first(batch, count)
                    trace_step(self._fake, self._module, step, part, others)
                    logged.append(self._fake.logged.get(name))
            self._known[step, name] = logged[0] == logged[1]
        return self._known[step, name]
