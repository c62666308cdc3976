"""Does training under every layout work on this machine? ``lightning-dist doctor``."""

from lightning_dist.doctor.examine import examine
from lightning_dist.doctor.report import Report
from lightning_dist.doctor.settings import Fault, Settings

__all__ = ["Fault", "Report", "Settings", "examine"]
