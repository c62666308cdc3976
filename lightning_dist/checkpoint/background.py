"""Saves that go on beside the training, one at a time."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_dist.checkpoint.lazy_tensors import leaves
from lightning_dist.dtensors import local_part


class HostMemory:
    """Host memory for copies of a state, kept from one to the next: to get it from the system takes several times as
    long as to copy into it. For tensors of an accelerator it is page-locked, and the copies run together.

    torch rounds page-locked memory up to powers of two; ``PYTORCH_ALLOC_CONF=pinned_max_round_threshold_mb:1`` makes it
    take what larger tensors need, and no more.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, torch.dtype, bool], list[Tensor]] = {}
        self._lent: list[tuple[tuple[torch.Size, torch.dtype, bool], Tensor]] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy, complete after :meth:`synchronize` and whole until :meth:`reuse`."""
        tensor = tensor.detach()
        if tensor.layout != torch.strided or tensor.is_quantized:
            return tensor.to("cpu", copy=True)
        locked = tensor.device.type != "cpu" and torch.accelerator.is_available()
        kind = tensor.shape, tensor.dtype, locked
        free = self._free.get(kind)
        memory = free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=locked)
        self._lent.append((kind, memory))
        # an alias: what is written on the copy, as an attribute, is not there the next time
        return memory.copy_(tensor, non_blocking=locked).view_as(memory)

    def snapshot(self, tree: Any, of: Any = None) -> Any:
        """A deep copy, its tensors in host memory: nothing that the training or its callbacks change is shared.

        Where the tree was gathered, ``of`` is what it was gathered from: tensors that share no memory with that were
        made for this, and are taken as they are.
        """
        shared = None if of is None else {_place(value) for _, value in leaves(of) if isinstance(value, Tensor)}
        copies: dict[int, Any] = {}
        for _, value in leaves(tree):
            if isinstance(value, Tensor) and id(value) not in copies:
                is_ours = shared is not None and value.device.type == "cpu" and _place(value) not in shared
                copies[id(value)] = value if is_ours else self.copy(value)
        return copy.deepcopy(tree, copies)

    def synchronize(self) -> None:
        """Waits for the copies from an accelerator."""
        if any(locked for (_, _, locked), _ in self._lent):
            torch.accelerator.synchronize()

    def reuse(self) -> None:
        """Takes back all that was lent, to be overwritten; what was not lent this time is let go."""
        self._free = {}
        for kind, memory in self._lent:
            self._free.setdefault(kind, []).append(memory)
        self._lent = []


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    """Where the memory of a tensor, or of a rank's part, begins."""
    local = local_part(tensor)
    return local.device, local.untyped_storage().data_ptr() if local.layout == torch.strided else 0


class BackgroundSaves:
    """Writes one checkpoint at a time in a thread, whose ranks agree over a process group of their own.

    Every rank calls the same methods in the same order. A checkpoint is there when :meth:`wait` has returned; what was
    under its name before is left whole until then.

    Attributes:
        memory: for the copy of the state that is written; held as long as this is.
    """

    def __init__(self) -> None:
        self.memory = HostMemory()
        self._group: Any = None
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
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
        self._path = path
        index = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
        self._thread = threading.Thread(target=self._run, args=(save, index), name="save checkpoint")
        self._thread.start()

    def _run(self, save: Callable[[dist.ProcessGroup | None], None], device_index: int | None) -> None:
        time.sleep(0.001)  # the thread that started this one goes on first: the training stands still until it has
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
        except (OSError, ValueError) as error:  # on one rank: raised, it would leave the others waiting
            rank_zero_warn(str(error))

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
            error.add_note(f"in the background, while {self._path} was saved; earlier checkpoints are left")
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
