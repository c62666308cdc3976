"""Trains what a Hydra config describes: ``python -m recipes.train [group=option] [key=value] ...``.

[Note: Hydra composes once]
Hydra runs in one process, which starts the ranks and hands them the resolved config. Under torchrun or SLURM the
ranks are there already: each composes the same config and joins. ``--help`` lists the groups.

[Note: late imports]
Tab completion, ``--help`` and ``--cfg`` answer at once because torch and Lightning are imported where they are used.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, setup_globals
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # `python recipes/train.py`, the form that Hydra's tab completion knows
    sys.path[0] = str(ROOT)
PLUGINS = str(ROOT / "recipes" / "plugins")
"""Of Hydra, which looks for them in the package ``hydra_plugins`` of any directory of the path."""
if PLUGINS not in sys.path:
    sys.path.append(PLUGINS)

from recipes import batches, fork_server, launchers, targets  # noqa: E402
from recipes.config_errors import ConfigError, did_you_mean, explain  # noqa: E402
from recipes.overrides import task_overrides  # noqa: E402
from recipes.sweep import job_process, resume  # noqa: E402
from recipes.sweep.result import JobResult  # noqa: E402
from recipes.sweep.running import hand_on, running  # noqa: E402

log = logging.getLogger("recipes.train")

DEFAULT_CPU_PROCESSES = 2
"""What ``trainer.devices=auto`` means on a machine without an accelerator: enough to show a layout."""


class JobFailed(CompactHydraException):
    """A job failed; its text is all that there is to show."""


@hydra.main(**targets.VERSION_BASE, config_path=str(ROOT / "conf"), config_name="config")
def train(cfg: DictConfig) -> float | None:
    """Runs one job to its end; in a sweep a failed job is logged, so that the next one runs.

    Returns:
        ``cfg.optimized_metric`` of the job, for sweepers that search; not a number if the job failed.
    """
    hydra_cfg = HydraConfig.get()
    in_sweep = hydra_cfg.mode == RunMode.MULTIRUN
    with contextlib.ExitStack() as stack:
        try:
            if in_sweep and (before := _begin(cfg, stack)) is not None:
                return _optimized(cfg, before.metrics)
            # once more: a launcher of Hydra's may have brought this to another process
            with targets.allow(allowed_targets(task_overrides(hydra_cfg))):
                metrics = _run(cfg)
            if metrics is None:
                hand_on(Path(hydra_cfg.runtime.output_dir), cfg.launcher.name)
                return None
            optimized = _optimized(cfg, metrics)
        except Exception as error:
            failure = _describe(error)
            _save_result(cfg, failure.splitlines()[0], {})
            if not in_sweep:
                raise JobFailed(failure) from None
            log.error("job %s failed: %s", hydra_cfg.job.num, failure)
            return float("nan")
        _save_result(cfg, None, metrics)
    return optimized


def _begin(cfg: DictConfig, stack: contextlib.ExitStack) -> JobResult | None:
    """A job of a sweep begins, and runs until the stack unwinds; the result of one that an earlier start of the sweep
    has done.
    """
    overrides, directory = task_overrides(HydraConfig.get()), Path(HydraConfig.get().runtime.output_dir)
    try:
        done = resume.done_before(cfg, directory, overrides)
        if done is None and _is_first_rank():
            stack.enter_context(running(directory))
    except ConfigError as error:
        raise SystemExit(str(error)) from None  # of the whole sweep, and what lies there stays
    if done is not None:
        log.info("job %s was done before, by an earlier start of this sweep", HydraConfig.get().job.num)
        return done
    resume.begin(cfg, directory, overrides, is_first_rank=_is_first_rank())
    return None


def main() -> None:
    """The command: :func:`train`, with what goes wrong told in one message and a status that says so."""
    if {"RANK", "SLURM_PROCID"} & os.environ.keys():
        _join_quietly()
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # Hydra then raises what it would print itself, with less to go on.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    batches.register()  # for --cfg job --resolve
    try:
        with targets.allow(allowed_targets(sys.argv[1:])):
            train()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (CompactHydraException, OmegaConfBaseException) as error:
        if full_error:
            raise
        print(str(error) if isinstance(error, (JobFailed, ConfigError)) else explain(error), file=sys.stderr)
        raise SystemExit(1) from None


def allowed_targets(arguments: Sequence[str]) -> tuple[str, ...]:
    """What a config may name, by ``conf/config.yaml`` and the arguments of a command line; see [Note: targets]."""
    conf = OmegaConf.load(ROOT / "conf" / "config.yaml")
    assert isinstance(conf, DictConfig)
    return targets.allowed_by_user(conf, arguments)


def _run(cfg: DictConfig) -> dict[str, float] | None:
    """The metrics of a job; None if it was only handed to others."""
    batches.register()
    targets.check(cfg)
    # tasks of SLURM that are to meet somewhere are agents, one a machine
    is_agent = "SLURM_PROCID" not in os.environ or cfg.launcher.get("rdzv_endpoint") is not None
    if cfg.launcher.name == "local" and "RANK" not in os.environ and is_agent:
        return _start(cfg)
    from lightning_dist.elastic import is_launched, leave_process_group  # See [Note: late imports]

    if is_launched():
        _check_layout(cfg, _settle_launched(cfg))
        result = _run_here(_resolve(cfg))
        leave_process_group()
        return result
    if cfg.launcher.name == "local":
        return _start(cfg)
    if cfg.launcher.name == "torchrun":
        raise ConfigError("launcher=torchrun, but neither torchrun nor srun started this process; use launcher=local")
    num_nodes, ranks_per_node = launchers.shape(cfg)
    _check_layout(cfg, num_nodes * ranks_per_node)
    return launchers.start(_resolve(cfg))


def _start(cfg: DictConfig) -> dict[str, float]:
    """Starts the ranks of this machine."""
    # In a sweep even one rank gets a process of its own, so that no job finds what an earlier one left.
    in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    start_method = job_process.start_method(cfg)
    is_alone = cfg.trainer.devices == 1 and not in_sweep and cfg.launcher.max_restarts == 0
    if start_method == "forkserver" and not is_alone:
        fork_server.start(cfg)
    from lightning_dist.elastic import Rendezvous, launch, leave_process_group  # See [Note: late imports]

    try:
        rendezvous = Rendezvous.parse(cfg.launcher.nnodes, cfg.launcher.rdzv_endpoint, cfg.launcher.rdzv_id)
    except ValueError as error:
        raise ConfigError(f"launcher: {error}") from None
    num_processes = _settle_started(cfg)
    _check_layout(cfg, num_processes * rendezvous.max_nodes)
    resolved = _resolve(cfg)
    is_watched = in_sweep or cfg.launcher.max_restarts > 0 or not rendezvous.is_alone
    if num_processes == 1 and not is_watched:
        result = _run_here(resolved)
        leave_process_group()
        return result
    arguments = resolved, launchers.hydra_config(), targets.allowed()
    return launch(
        _run_rank,
        *arguments,
        num_processes=num_processes,
        max_restarts=cfg.launcher.max_restarts,
        rendezvous=rendezvous,
        start_method=start_method,
        shutdown_timeout=cfg.launcher.shutdown_timeout,
    )[0]


def _resolve(cfg: DictConfig) -> DictConfig:
    try:
        return DictConfig(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from None


def join(cfg: DictConfig, hydra_cfg: DictConfig, allowed: tuple[str, ...]) -> dict[str, float]:
    """What a rank does that SLURM or Ray has started: the job of a config that was composed and resolved elsewhere.

    Where this job has left checkpoints, it has been started again: it goes on from the last.

    Args:
        cfg: the resolved config of the job.
        hydra_cfg: Hydra's own.
        allowed: what the config may name, see [Note: targets].
    """
    HydraConfig.instance().set_config(hydra_cfg)
    cfg.trainer.num_nodes, cfg.trainer.devices = _launched_shape()
    if cfg.ckpt_path is None and resume.goes_on(cfg, Path(HydraConfig.get().runtime.output_dir)):
        cfg.ckpt_path = "last"
    try:
        metrics = _run_rank(cfg, hydra_cfg, allowed)
    except Exception as error:
        _save_result(cfg, _describe(error).splitlines()[0], {})
        raise
    _save_result(cfg, None, metrics)
    return metrics


def _run_here(cfg: DictConfig) -> dict[str, float]:
    from recipes import job  # See [Note: late imports]
    from recipes.console import quiet_lightning

    quiet_lightning()
    return job.run(cfg)


def _run_rank(cfg: DictConfig, hydra_cfg: DictConfig, allowed: tuple[str, ...]) -> dict[str, float]:
    job_process.leave_console()
    setup_globals()
    HydraConfig.instance().set_config(hydra_cfg)
    cfg.trainer.num_nodes = _launched_shape()[0]
    with targets.allow(allowed):
        configure_log(hydra_cfg.hydra.job_logging, hydra_cfg.hydra.verbose)
        if not _is_first_rank():
            logging.disable(logging.INFO)
        return _run_here(cfg)


def _settle_launched(cfg: DictConfig) -> int:
    """Writes into the trainer's config what ranks are there, and returns their number."""
    num_nodes, num_local = _launched_shape()
    if cfg.trainer.devices != "auto" and count_devices(cfg.trainer.devices, cfg.trainer.accelerator) != num_local:
        raise ConfigError(
            f"trainer.devices={cfg.trainer.devices} but {num_local} ranks were started on this machine; "
            "leave trainer.devices out, or start as many ranks"
        )
    cfg.trainer.devices, cfg.trainer.num_nodes = num_local, num_nodes
    return num_local * num_nodes


def _settle_started(cfg: DictConfig) -> int:
    """Writes into the trainer's config how many ranks to start on this machine, and returns it."""
    if cfg.trainer.num_nodes != 1:
        raise ConfigError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}, but this command starts ranks on one machine only; "
            "for several machines pass launcher=slurm, kubernetes or ray, or start it with torchrun or srun"
        )
    num_processes = count_devices(cfg.trainer.devices, cfg.trainer.accelerator)
    if not OmegaConf.is_list(cfg.trainer.devices):
        cfg.trainer.devices = num_processes
    return num_processes


def _launched_shape() -> tuple[int, int]:
    """Machines, and ranks on each of them, as torchrun or SLURM started them."""
    environ = os.environ
    if "WORLD_SIZE" in environ:
        num_local = int(environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"]))
        return int(environ["WORLD_SIZE"]) // num_local, num_local
    num_nodes = int(environ.get("SLURM_NNODES", 1))
    return num_nodes, int(environ["SLURM_NTASKS"]) // num_nodes


def count_devices(devices: Any, accelerator: str) -> int:
    """How many devices Lightning would take for ``trainer.devices``."""
    if OmegaConf.is_list(devices):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([index for index in devices.split(",") if index.strip()])
    if devices in ("auto", -1, "-1"):
        return _available(accelerator)
    try:
        num_devices = int(devices)
    except (TypeError, ValueError):
        num_devices = 0
    if num_devices < 1:
        raise ConfigError(f"trainer.devices={devices}: pass a number of ranks, a list of devices, or auto")
    return num_devices


def _available(accelerator: str) -> int:
    import torch

    if accelerator == "cpu" or not torch.accelerator.is_available():
        return DEFAULT_CPU_PROCESSES
    return torch.accelerator.device_count()


def _check_layout(cfg: DictConfig, world_size: int) -> None:
    """Refuses a layout that doesn't fit before any process starts."""
    from lightning_dist.layout import Layout

    if "layout" not in cfg.strategy:
        return
    value: Any = cfg.strategy.layout
    try:
        layout = Layout.parse(dict(value) if OmegaConf.is_dict(value) else value)
        if layout is not None:
            layout.resolve(world_size)
    except ValueError as error:
        raise ConfigError(f"strategy.layout: {error}") from None


def _optimized(cfg: DictConfig, metrics: dict[str, float]) -> float | None:
    if cfg.optimized_metric is None:
        return None
    if cfg.optimized_metric not in metrics:
        raise ConfigError(
            f"optimized_metric={cfg.optimized_metric} is not among the metrics {', '.join(metrics)}"
            + did_you_mean(cfg.optimized_metric, metrics)
        )
    return metrics[cfg.optimized_metric]


def _describe(error: Exception) -> str:
    """All that there is to show of a failure: one message for a config error, else the failing rank's traceback."""
    of_config = CompactHydraException, OmegaConfBaseException
    if isinstance(error, of_config):
        return str(error)
    from lightning_dist.elastic import WorkerFailed  # See [Note: late imports]
    from lightning_dist.elastic.failures import short_traceback

    if isinstance(error, WorkerFailed):
        return str(error.exception if isinstance(error.exception, of_config) else error)
    return f"{type(error).__name__}: {error}\n\n{short_traceback(error)}"


def _save_result(cfg: DictConfig, error: str | None, metrics: dict[str, float]) -> None:
    if _is_first_rank():
        overrides = task_overrides(HydraConfig.get())
        JobResult(overrides, error, metrics, cfg.optimized_metric).save(Path(HydraConfig.get().runtime.output_dir))


def _is_first_rank() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _join_quietly() -> None:
    """Under torchrun or SLURM every rank runs Hydra: only the first writes files and logs INFO."""
    from lightning_dist.elastic import is_launched

    if not is_launched():
        return
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        raise SystemExit("--multirun starts the ranks of its jobs itself: run it without torchrun or srun")
    if not _is_first_rank():
        sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=none"]
        logging.disable(logging.INFO)


if __name__ == "__main__":
    from recipes import train as by_its_name  # by which processes elsewhere find what they are to call

    by_its_name.main()
