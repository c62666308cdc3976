"""Starting the ranks of a job, and ending them together."""

from lightning_dist.elastic.failures import WorkerFailed
from lightning_dist.elastic.launch import is_launched, launch
from lightning_dist.elastic.rank import leave_process_group
from lightning_dist.elastic.rendezvous import Rendezvous

__all__ = ["Rendezvous", "WorkerFailed", "is_launched", "launch", "leave_process_group"]
