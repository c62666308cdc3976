"""The pipeline axis: an unmodified module cut into stages.

``placeholder``, ``skeleton`` and ``trace`` find out what a step does without computing it; ``cuts``, ``balance`` and
``stages`` decide where it is cut; ``passage`` runs the user's step from one cut to the next and ``wire`` carries what
crosses; ``batches`` cuts batches into microbatches, ``schedule`` orders them, ``check`` compares them with the whole
batch, and ``axis`` is what Lightning's hooks call.
"""

from lightning_dist.parallel.pipeline.axis import Pipelined
from lightning_dist.parallel.pipeline.batches import BatchSplit
from lightning_dist.parallel.pipeline.setup import cut_module, cut_of, plan_stages
from lightning_dist.parallel.pipeline.stages import Cut, PipelineOptions, Stages

__all__ = [
    "BatchSplit",
    "Cut",
    "PipelineOptions",
    "Pipelined",
    "Stages",
    "cut_module",
    "cut_of",
    "plan_stages",
]
