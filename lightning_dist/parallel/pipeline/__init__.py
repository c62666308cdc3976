"""The pipeline axis: an unmodified module cut into stages. Where to start reading is in README.md.

[Note: arguments under pp]
Docstrings here leave out what is the same everywhere: ``module`` is the LightningModule, of which this rank holds its
stages; ``stages`` are those of all ranks; ``group`` is the ranks of the pipeline and ``device`` that of this rank;
``trace`` is that of a step; ``options`` are the user's; ``patches`` takes off what is put onto the module.
"""

from lightning_dist.parallel.pipeline.batch_split import BatchSplit
from lightning_dist.parallel.pipeline.partition import partition_module, partition_of, plan_stages
from lightning_dist.parallel.pipeline.runner import PipelineRunner
from lightning_dist.parallel.pipeline.schedule import PipelineOptions
from lightning_dist.parallel.pipeline.stages import PartitionedModule, Stages, whole_of_all_stages

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
