"""Sweeps: what their jobs leave, the table and the page over all of them, jobs side by side, and going on.

Start reading at ``jobs.py``. This package imports nothing that is slow itself.
"""

from recipes.sweep.at_end import SweepTable
from recipes.sweep.result import JobResult

__all__ = ["JobResult", "SweepTable"]
