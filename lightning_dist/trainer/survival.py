"""The options of a strategy for machines that fail and numbers that are wrong."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_dist.numbers import NumberChecks
from lightning_dist.trainer.preemption import MaxTime
from lightning_dist.trainer.snapshots import SnapshotOptions


@dataclass(frozen=True)
class SurvivalOptions:
    """What a strategy does about failures; :class:`~lightning_dist.HybridStrategy` documents each."""

    snapshots: SnapshotOptions
    checks: NumberChecks
    report_stragglers: bool
    max_time: MaxTime = None
