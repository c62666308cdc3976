"""What a module logs, counted as one process counts it.

``step_logs`` stands between Lightning and its results and says when values are reduced, by who reads them: ``readers``,
which ``mentions`` finds in the code. ``results`` puts the values of all ranks in place, which ``joint`` reduces all at
once; ``values`` makes numbers whole that are logged in parts, ``metrics`` helps torchmetrics where ranks differ in what
they updated.
"""

from lightning_dist.logs.metrics import attach_metrics
from lightning_dist.logs.step_logs import StepLogs
from lightning_dist.logs.uncounted import Uncounted

__all__ = ["StepLogs", "Uncounted", "attach_metrics"]
