"""What a module logs, counted as one process counts it.

``step_logs`` stands between Lightning and its results and says when values are reduced, ``joint`` reduces them all at
once, ``metrics`` helps torchmetrics where ranks differ in what they updated.
"""

from lightning_dist.logs.metrics import attach_metrics
from lightning_dist.logs.step_logs import StepLogs

__all__ = ["StepLogs", "attach_metrics"]
