"""One failed rank ends the run: no rank stays behind, and the failure that came first is the one shown."""

from __future__ import annotations

import signal
import time
from typing import Any

from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

GRACE = 5.0
"""Seconds that the other processes of a script get to end by themselves, so that the first to fail can say why."""


def end_children(launcher: Any, grace: float = GRACE) -> None:
    """Ends the processes that this one started, after it failed.

    Where the backend notices a lost peer (gloo), they have failed by themselves and are showing why; where it does not,
    they wait in a collective for as long as its timeout lasts.

    Args:
        launcher: of the strategy; only that of scripts has processes to end.
        grace: seconds to wait for them.
    """
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return
    deadline = time.monotonic() + grace
    while any(process.poll() is None for process in launcher.procs) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in launcher.procs:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
