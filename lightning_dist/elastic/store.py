"""``lightning-dist store``: the store at which the machines of a run meet, on a machine that outlives them."""

from __future__ import annotations

import argparse
import signal
import threading
from typing import Any

import torch.distributed as dist

PORT = 29400


def add_store(commands: Any) -> None:
    """Adds the subcommand to what ``add_subparsers`` gave."""
    store = commands.add_parser(
        "store",
        help="serve the store at which the machines of a run meet",
        description="Serves until it gets SIGTERM or SIGINT. The machines get --rdzv-endpoint HOST:PORT of this one.",
    )
    store.add_argument("--port", type=int, default=PORT, help=f"to listen at (default: {PORT})")
    store.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> int:
    """Exit status 0, after a signal."""
    store = dist.TCPStore("localhost", options.port, is_master=True, wait_for_workers=False, multi_tenant=True)
    print(f"serving a store at port {store.port}", flush=True)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    return 0
