"""``lightning-dist run SCRIPT``: a user's script on several ranks, which go on after a failure."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

from lightning_dist.elastic import fork_server
from lightning_dist.elastic.failures import WorkerFailed
from lightning_dist.elastic.launch import is_launched, launch
from lightning_dist.elastic.rendezvous import Rendezvous

MAX_RESTARTS = 10


def add_run(commands: Any) -> None:
    """Adds the subcommand to what ``add_subparsers`` gave."""
    run = commands.add_parser(
        "run",
        help="run a script on several ranks, and go on after a failure",
        description="Runs SCRIPT as __main__ on every rank, as torchrun does. When a rank dies all start again, and "
        "its fits go on from the newest checkpoint that this run wrote.",
    )
    run.add_argument("--nproc", type=int, metavar="N", help="ranks of this machine (default: one an accelerator, or 1)")
    told = f"how often all start again after a failure (default: {MAX_RESTARTS})"
    run.add_argument("--max-restarts", type=int, default=MAX_RESTARTS, metavar="K", help=told)
    run.add_argument("--nnodes", default="1", metavar="MIN:MAX", help="machines, each of which runs this command")
    run.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="of one of them, at which all meet")
    run.add_argument("--rdzv-id", metavar="NAME", help="the same for all machines of a run")
    run.add_argument("script", metavar="SCRIPT", type=Path)
    run.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="of the script")
    run.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    """Exit status: 0, or 1 if a rank failed for good.

    Raises:
        ValueError: options that can't be.
    """
    if is_launched():
        raise ValueError("run starts the ranks itself; start it as one process, without torchrun or srun")
    if not options.script.is_file():
        raise ValueError(f"there is no script {options.script}")
    num_processes = options.nproc or (torch.accelerator.device_count() if torch.accelerator.is_available() else 1)
    rendezvous = Rendezvous.parse(options.nnodes, options.rdzv_endpoint, options.rdzv_id)
    start_method = "forkserver" if sys.platform == "linux" else "spawn"
    if start_method == "forkserver":
        fork_server.start(fork_server.imported_by(options.script))
    try:
        launch(
            run_script,
            str(options.script),
            options.arguments,
            num_processes=num_processes,
            max_restarts=options.max_restarts,
            rendezvous=rendezvous,
            start_method=start_method,
        )
    except WorkerFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run_script(script: str, arguments: list[str]) -> None:
    """On a rank: runs the script as ``__main__``, as ``python SCRIPT ARGS`` does. ``sys.exit(0)`` is its end."""
    sys.argv[:] = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        if error.code not in (None, 0):
            raise
