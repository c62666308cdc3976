"""What the user sees: the layout at the start, the pace of the training while it runs."""

from lightning_dist.report.layout import LayoutReport, PipelineReport
from lightning_dist.report.sharding_plan import ShardingPlanReport
from lightning_dist.report.throughput import Throughput
from lightning_dist.report.timeline import PipelineTimeline

__all__ = ["ShardingPlanReport", "LayoutReport", "PipelineReport", "PipelineTimeline", "Throughput"]
