"""The process of one job of a sweep, see [Note: processes of slots]."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing.process import parent_process
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

CONSOLE = "RECIPES_CONSOLE"
"""The file that takes what a job prints, for its ranks too."""


@dataclass(frozen=True)
class Call:
    """What the process of a job is handed.

    Args:
        config: of the job, composed, with Hydra's own.
        task: what it calls, as ``(module, name)``.
        allowed: what the config may name, see [Note: targets].
        environment: of this process.
        console: the file that takes what it prints.
        server: where the fork server of the sweep is; empty without one.
    """

    config: DictConfig
    task: tuple[str, str]
    allowed: tuple[str, ...]
    environment: dict[str, str]
    console: str
    server: dict[str, Any]


def run(call: Call) -> None:
    """Runs the job, as Hydra would within the process of the sweep; how it ended it leaves in its directory."""
    os.environ.clear()
    os.environ.update(call.environment)
    os.environ[CONSOLE] = call.console
    leave_console()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _end_with_sweep()
    if call.server:
        from lightning_dist.compat.fork_server import use_server

        use_server(call.server)
    from hydra._internal.callbacks import Callbacks
    from hydra.core.utils import JobRuntime, run_job, setup_globals
    from hydra.types import HydraContext

    from recipes import targets

    targets.set_version_base()
    setup_globals()
    JobRuntime.instance().set("name", call.config.hydra.job.name)
    task = getattr(importlib.import_module(call.task[0]), call.task[1])
    with targets.allow(call.allowed):
        context: Any = HydraContext(config_loader=None, callbacks=Callbacks(call.config))  # type: ignore[arg-type]
        returned = run_job(
            hydra_context=context,
            task_function=task,
            config=call.config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        _ = returned.return_value  # raises what the task did


def start_method(cfg: DictConfig) -> str:
    """How the processes of a config's jobs and ranks start; the config may leave it open."""
    return OmegaConf.select(cfg, "start_method") or ("forkserver" if sys.platform == "linux" else "spawn")


def leave_console() -> None:
    """Has this process, a job of a slot or a rank of one, write to the file of the job; Ctrl-C no longer reaches it.

    Nothing elsewhere: other processes have no such file.
    """
    if CONSOLE not in os.environ:
        return
    os.setpgid(0, 0)
    file = Path(os.environ[CONSOLE])
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)


def _end_with_sweep() -> None:
    """Ends this job when the sweep was killed: as by SIGTERM, so that it saves."""
    sweep = parent_process()
    if sweep is None:
        return

    def wait() -> None:
        sweep.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="end with sweep", daemon=True).start()
