"""Does a user's own module give the numbers of one process under a layout? ``lightning-dist verify``."""

from lightning_dist.verify.departure import Departure
from lightning_dist.verify.results import LayoutResult, Verification
from lightning_dist.verify.verification import verify

__all__ = ["Departure", "LayoutResult", "Verification", "verify"]
