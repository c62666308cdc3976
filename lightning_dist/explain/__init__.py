"""What a layout would do to a module, shown without training: ``lightning-dist explain`` and ``strategy.explain``."""

from lightning_dist.explain.plan import build_deferred, plan_report
from lightning_dist.explain.subject import (
    Subject,
    Target,
    find_in_project,
    find_recipes,
    module_maker,
    parse_arguments,
)

__all__ = [
    "Subject",
    "Target",
    "build_deferred",
    "find_in_project",
    "find_recipes",
    "module_maker",
    "parse_arguments",
    "plan_report",
]
