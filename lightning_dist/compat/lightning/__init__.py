"""Private names of Lightning."""

from lightning_dist.compat.lightning.first_batch import *
from lightning_dist.compat.lightning.logs import *
from lightning_dist.compat.lightning.strategy import *
