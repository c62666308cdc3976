"""Starting the ranks of a job, and ending them together."""

from lightning_dist.elastic.launch import WorkerFailed, is_launched, launch

__all__ = ["WorkerFailed", "is_launched", "launch"]
