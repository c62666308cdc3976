"""Writes one part after the other to a rank's two slots, and finishes each in a thread.

[Note: snapshots that all ranks have]
A rank writes over the slot before the last only when all ranks have finished the last. So whenever a rank dies, there
is one snapshot of which all parts are whole: the last, or the one before.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dist.checkpoint.slots import Header, NoRoom, Slot
from lightning_dist.checkpoint.snapshot_state import Row
from lightning_dist.trainer.snapshot_partner import Partner

PATIENCE = 5.0
"""Seconds for a snapshot to become whole after an exception."""

log = logging.getLogger(__name__)


class SnapshotWriter:
    """Copies tensors while the training waits, and has a thread do the rest.

    Args:
        slots: two, to be written in turn.
        group: of all ranks, for the thread; None for one process.
        partner: a rank of another node that keeps a copy, where there are several.

    Communication, in the thread: what the partner says, and an all-reduce of 8 bytes over the group.
    """

    def __init__(self, slots: list[Slot], group: Any, partner: Partner | None) -> None:
        self._slots, self._group, self._partner = slots, group, partner
        self.count = 0
        """Of snapshots by now."""
        self.goes_on = True
        """Whether all ranks could write the last one."""
        self._targets: list[tuple[Any, list[Tensor]]] = [(None, []), (None, [])]
        """By slot, where the tensors go, and the rows that say so."""
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._is_idle = threading.Event()
        self._is_idle.set()
        threading.Thread(target=self._serve, name="snapshots", daemon=True).start()

    def write(self, header: Header, rows: list[Row], tensors: list[Tensor], table: bytes, small: bytes) -> None:
        """Writes the next part, after :meth:`wait`. Tensors may change when it returns."""
        number = self.count % 2
        slot: Slot | None = self._slots[number]
        self.count += 1
        done = None
        try:
            assert slot is not None
            slot.open(header.nbytes)
            done = self._copy(rows, tensors, number)
            slot.put(header.tensors, table + small)
        except NoRoom as error:
            log.warning("no more snapshots are taken: %s", error)
            slot = None
        self._is_idle.clear()
        self._tasks.put(lambda: self._finish(slot, header, done))

    def _copy(self, rows: list[Row], tensors: list[Tensor], number: int) -> Any:
        """Copies tensors to where their rows say; of an accelerator to page-locked memory first, in the order of what
        it computes. Gives what to wait for.
        """
        memory, end = self._slots[number].memory, rows[-1].offset + tensors[-1].nbytes if rows else 0
        on_device = any(tensor.device.type != "cpu" for tensor in tensors)
        if on_device:
            if len(self._staging) < end:
                self._staging = torch.empty(end, dtype=torch.uint8, pin_memory=True)
            memory = self._staging
        made_of, targets = self._targets[number]
        if made_of is None or made_of[0] is not rows or made_of[1] is not memory:
            targets = [_place(memory, row, tensor) for row, tensor in zip(rows, tensors, strict=True)]
            self._targets[number] = (rows, memory), targets
        for target, tensor in zip(targets, tensors, strict=True):
            target.copy_(tensor, non_blocking=on_device)
        if not on_device:
            return None
        done = torch.Event(next(tensor.device for tensor in tensors if tensor.device.type != "cpu"))
        done.record()
        return done

    def _serve(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            self._is_idle.set()

    def _finish(self, slot: Slot | None, header: Header, done: Any) -> None:
        """Makes a slot whole, and hears whether all ranks have; see [Note: snapshots that all ranks have]."""
        try:
            if slot is not None:
                if done is not None:
                    done.synchronize()
                    slot.memory[: header.tensors].copy_(self._staging[: header.tensors])
                header = replace(header, checksum=slot.checksum(header))
                slot.commit(header)
            kept = self._partner is None or self._partner.exchange(slot, header)
            have = torch.tensor(int(slot is not None and kept))
            if self._group is not None:
                dist.all_reduce(have, dist.ReduceOp.MIN, self._group)
            self.goes_on = bool(have)
        except RuntimeError as error:  # a rank is gone, as the training will notice
            self.goes_on = False
            log.warning("no more snapshots are taken: %s", error)

    def wait(self, timeout: float | None = None) -> None:
        """Returns when the last snapshot is whole, or has failed, or after so many seconds."""
        self._is_idle.wait(timeout)

    def end(self, failed: bool) -> None:
        """No more are written. The last one stays, and after a failure the one before."""
        self.wait(PATIENCE if failed else None)  # other ranks may be gone
        self._tasks.put(None)
        if not failed:
            self._slots[self.count % 2].remove()


def _place(memory: Tensor, row: Row, tensor: Tensor) -> Tensor:
    """A tensor's own in the memory of a slot."""
    if not tensor.numel():
        return torch.empty_like(tensor, device="cpu")
    return memory[row.offset : row.offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
