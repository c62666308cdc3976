"""What a module logs, counted as one process counts it."""

from lightning_dist.logs.metrics import RepeatedBatch, attach_metrics
from lightning_dist.logs.step_logs import StepLogs, attach_logs

__all__ = ["RepeatedBatch", "StepLogs", "attach_logs", "attach_metrics"]
