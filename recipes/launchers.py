"""Where the ranks of a job run: what ``launcher=...`` of a config starts them with.

``local`` and ``torchrun`` are :mod:`recipes.train`'s own. The others hand the resolved config on: each rank gets it as
it was composed, but for Kubernetes, whose pods compose it again from the same command line.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from recipes import targets
from recipes.config_errors import ConfigError, did_you_mean
from recipes.overrides import task_overrides

log = logging.getLogger("recipes.train")


def start(cfg: DictConfig) -> dict[str, float] | None:
    """Has the ranks of a job started elsewhere.

    Args:
        cfg: the resolved config.

    Returns:
        the metrics of the job; None if it was only submitted or printed.

    Raises:
        ConfigError: what the launcher needs is missing, or can't be.
    """
    name = cfg.launcher.name
    if name not in LAUNCHERS:
        raise ConfigError(f"launcher.name={name} is none of {', '.join(LAUNCHERS)}{did_you_mean(name, LAUNCHERS)}")
    try:
        return LAUNCHERS[name](cfg)
    except ValueError as error:
        raise ConfigError(f"launcher={name}: {error}") from None


def shape(cfg: DictConfig) -> tuple[int, int]:
    """Machines, and ranks on each of them, that a config asks for.

    Raises:
        ConfigError: they are not numbers: ``auto`` would count the devices of this machine.
    """
    devices = cfg.trainer.devices
    if not isinstance(devices, int) or devices < 1:
        raise ConfigError(
            f"trainer.devices={devices}, but launcher={cfg.launcher.name} starts ranks on other machines; "
            "pass how many each of them has"
        )
    return cfg.trainer.num_nodes, devices


def hydra_config() -> DictConfig:
    """Hydra's own config of this job, for its ranks. What a plugin adds is plain there: a class of Hydra's launcher of
    SLURM is another one where it runs a job, and can't be pickled.
    """
    config: Any = copy.deepcopy(HydraConfig.instance().cfg)
    with read_write(config.hydra), open_dict(config.hydra):
        for plugin in ("launcher", "sweeper"):
            config.hydra[plugin] = OmegaConf.to_container(config.hydra[plugin])
    return config


def _call(cfg: DictConfig) -> tuple[Any, ...]:
    """What a rank elsewhere calls, and its arguments."""
    from recipes.train import join  # which imports this module

    return join, cfg, hydra_config(), targets.allowed()


def _asked(cfg: DictConfig) -> dict[str, Any]:
    """What the config says of the launcher; what it leaves open is left out."""
    asked: Any = OmegaConf.to_container(cfg.launcher)
    asked["name"] = asked.pop("job_name")
    return {name: value for name, value in asked.items() if value is not None}


def _uses_gpus(cfg: DictConfig) -> bool:
    return cfg.trainer.accelerator != "cpu"


def _slurm(cfg: DictConfig) -> dict[str, float] | None:
    from lightning_dist.launchers.slurm import Slurm

    num_nodes, ranks_per_node = shape(cfg)
    asked = _asked(cfg)
    wait = asked.pop("wait")
    if cfg.optimized_metric is not None and not wait:
        raise ValueError("optimized_metric is known when the job has ended; pass launcher.wait=true as well")
    asked.setdefault("gpus_per_node", ranks_per_node if _uses_gpus(cfg) else 0)
    job = Slurm(num_nodes=num_nodes, ranks_per_node=ranks_per_node, **asked).submit(*_call(cfg))
    log.info("submitted job %s; the output of its ranks comes to %s", job.job_id, cfg.launcher.folder)
    return job.results()[0] if wait else None


def _kubernetes(cfg: DictConfig) -> None:
    from lightning_dist.launchers.kubernetes import FIRST_POD, Kubernetes

    num_nodes, ranks_per_node = shape(cfg)
    asked = _asked(cfg)
    output, gpu, _ = asked.pop("output"), asked.pop("gpu"), asked.pop("min_nodes", None)
    if not any(Path(output).is_relative_to(volume["path"]) for volume in asked.get("volumes", {}).values()):
        raise ValueError(
            f"launcher.output={output} is in no volume, so each pod would write its own and lose it; "
            "pass launcher.volumes={work: {claim: NAME, path: DIRECTORY}}"
        )
    if _uses_gpus(cfg):
        asked["resources"] = {gpu: ranks_per_node} | asked.get("resources", {})
    command = _command_of_pod(cfg, output, FIRST_POD)
    job = Kubernetes(command=command, num_nodes=num_nodes, ranks_per_node=ranks_per_node, **asked)
    print("---\n".join(OmegaConf.to_yaml(DictConfig(document)) for document in job.manifest()), end="")


def _command_of_pod(cfg: DictConfig, output: str, first_pod: str) -> list[str]:
    hydra_cfg = HydraConfig.get()
    if elsewhere := [source.path for source in hydra_cfg.runtime.config_sources if source.provider == "command-line"]:
        raise ValueError(f"--config-dir {elsewhere[0]} is on this machine only; put what it has into conf/")
    of_pods = "launcher=", "launcher.", "trainer.devices=", "trainer.num_nodes=", "hydra."
    overrides = [argument for argument in task_overrides(hydra_cfg) if not argument.lstrip("+~").startswith(of_pods)]
    least, most, per_pod = cfg.launcher.min_nodes, cfg.trainer.num_nodes, cfg.trainer.devices
    of_agent = [
        *(f"trainer.devices={per_pod}", f"launcher.nnodes={most if least is None else f'{least}:{most}'}"),
        *(f"launcher.rdzv_endpoint={first_pod}", f"launcher.rdzv_id={cfg.launcher.job_name}"),
        f"launcher.max_restarts={cfg.launcher.max_restarts}",
    ]
    go_on = [] if cfg.ckpt_path else ["ckpt_path=last"]
    return ["python", "-m", "recipes.train", *overrides, *of_agent, *go_on, f"hydra.run.dir={output}"]


def _ray(cfg: DictConfig) -> dict[str, float]:
    from lightning_dist.launchers.ray import Ray

    asked, (num_nodes, ranks_per_node) = cfg.launcher, shape(cfg)
    job = Ray(
        num_nodes * ranks_per_node,
        resources_per_rank=asked.resources_per_rank or ({"GPU": 1} if _uses_gpus(cfg) else {"CPU": 1}),
        storage=asked.storage,
        address=asked.address,
        placement=asked.placement,
        max_restarts=asked.max_restarts,
    )
    return job.launch(*_call(cfg))


LAUNCHERS: dict[str, Callable[[DictConfig], dict[str, float] | None]] = {
    "slurm": _slurm,
    "kubernetes": _kubernetes,
    "ray": _ray,
}
