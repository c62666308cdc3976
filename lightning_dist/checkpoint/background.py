"""Saves that go on beside the training, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_dist.checkpoint.host_memory import HostMemory


class BackgroundSaves:
    """Writes one checkpoint at a time in a thread, whose ranks agree over a process group of their own.

    Every rank calls the same methods in the same order. A checkpoint is there when :meth:`wait` has returned; what was
    under its name before is left whole until then.

    Attributes:
        memory: for the copy of the state that is written; held as long as this is.
        path: of the last one.
    """

    def __init__(self) -> None:
        self.memory = HostMemory()
        self._group: Any = None
        self._thread: threading.Thread | None = None
        self.path: Path | None = None
        self._error: BaseException | None = None
        self._afterwards: list[Callable[[], None]] = []

    def start(self, path: Path, save: Callable[[dist.ProcessGroup | None], None]) -> None:
        """Begins a save, after :meth:`wait`. It is given the group to communicate over, and touches nothing that the
        training changes; the path is for messages.
        """
        assert self._thread is None
        self.memory.synchronize()
        if self._group is None and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
        self.path = path
        index = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
        self._thread = threading.Thread(target=self._run, args=(save, index), name="save checkpoint")
        self._thread.start()

    def _run(self, save: Callable[[dist.ProcessGroup | None], None], device_index: int | None) -> None:
        try:
            if device_index is not None:  # a new thread begins at device 0, and would take memory there
                torch.accelerator.set_device_index(device_index)
            save(self._group)
        except BaseException as error:
            self._error = error

    def afterwards(self, action: Callable[[], None]) -> None:
        """Runs an action when the save in flight has ended well, or at once if there is none: an earlier checkpoint is
        removed when a later one is there, and not if that failed. What an action meets is a warning.
        """
        if self._thread is None:
            self._act(action)
        else:
            self._afterwards.append(action)

    def _act(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # on one rank: raised, it would leave the others waiting
            rank_zero_warn(str(error))

    @property
    def is_busy(self) -> bool:
        """Whether there is a save in flight, or one that has ended and was not waited for."""
        return self._thread is not None

    def wait(self) -> None:
        """Returns when nothing is in flight; an OSError or RuntimeError on every rank if the save failed."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.join()
        self.memory.reuse()
        actions, self._afterwards = self._afterwards, []
        error, self._error = self._error, None
        if error is not None:
            error.add_note(f"in the background, while {self.path} was saved; earlier checkpoints are left")
            raise error
        for action in actions:
            self._act(action)

    def end(self) -> None:
        """Waits, and gives the process group back."""
        try:
            self.wait()
        finally:
            group, self._group, self.memory = self._group, None, HostMemory()
            if group is not None and dist.is_initialized():
                dist.destroy_process_group(group)
