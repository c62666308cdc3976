"""Starting the ranks of a job, and ending them together."""

from lightning_dist.elastic.failures import WorkerFailed
from lightning_dist.elastic.launch import is_launched, launch, leave_process_group

__all__ = ["WorkerFailed", "is_launched", "launch", "leave_process_group"]
