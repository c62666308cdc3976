"""What a command line overrides, as it was written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from hydra.conf import HydraConf


def task_overrides(hydra_cfg: DictConfig | HydraConf) -> list[str]:
    """The overrides of a job. What they refer to (``lr=${scheduler.lr}``) is of the job's config, so in Hydra's own it
    is left as it stands.

    Args:
        hydra_cfg: Hydra's own config of the job.
    """
    written: Any = OmegaConf.to_container(hydra_cfg.overrides.task, resolve=False)
    return list(written)
