"""The pipeline axis: an unmodified module cut into stages. Where to start reading is in README.md."""

from lightning_dist.parallel.pipeline.batch_split import BatchSplit
from lightning_dist.parallel.pipeline.options import PipelineOptions
from lightning_dist.parallel.pipeline.other_stages import whole_of_all_stages
from lightning_dist.parallel.pipeline.partition import partition_module, partition_of, plan_stages
from lightning_dist.parallel.pipeline.runner import PipelineRunner
from lightning_dist.parallel.pipeline.stages import PartitionedModule, Stages

__all__ = [
    "BatchSplit",
    "PartitionedModule",
    "PipelineOptions",
    "PipelineRunner",
    "Stages",
    "partition_module",
    "partition_of",
    "plan_stages",
    "whole_of_all_stages",
]
