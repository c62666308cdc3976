"""What each axis does to a module (``parallelize`` has the order), and what runs its steps then."""

from lightning_dist.parallel.activation_checkpoint import Checkpointing, validate_blocks
from lightning_dist.parallel.buffers import average_buffers
from lightning_dist.parallel.ddp import DDPRunner
from lightning_dist.parallel.fsdp import FSDPRunner
from lightning_dist.parallel.parallelize import parallelize
from lightning_dist.parallel.single_process import SingleProcessRunner

__all__ = [
    "Checkpointing",
    "DDPRunner",
    "FSDPRunner",
    "SingleProcessRunner",
    "average_buffers",
    "parallelize",
    "validate_blocks",
]
