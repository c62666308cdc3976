"""What a module logs, counted as one process counts it."""

from lightning_dist.logs.attach import attach_logs
from lightning_dist.logs.metrics import attach_metrics
from lightning_dist.logs.repeated_batch import RepeatedBatch
from lightning_dist.logs.step_logs import StepLogs

__all__ = ["RepeatedBatch", "StepLogs", "attach_logs", "attach_metrics"]
