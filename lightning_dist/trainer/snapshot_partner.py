"""What a rank holds of a snapshot, sent to a rank of the next node, which keeps it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_dist.checkpoint.slots import PAGE, PIECE, Header, NoRoom, Slot, two_slots
from lightning_dist.trainer.snapshot_search import Nodes

log = logging.getLogger(__name__)


class Partner:
    """Sends this rank's part to the next node, and keeps those that come from the node before.

    The n-th rank of a node sends to the n-th of the next one, or where that has fewer, to its last.

    Args:
        nodes: where the ranks are.
        group: of all ranks, for a thread.
        folder: of this node, for what comes.
        fit: whose snapshots they are.
        kept: the snapshot that the fit goes on from.

    Communication: this rank's part in pieces, to one rank; as many as there are send to this one.
    """

    def __init__(self, nodes: Nodes, group: Any, folder: Path, fit: str, kept: Any) -> None:
        rank, self._group = dist.get_rank(), group
        self._to = nodes.partner_of(rank)
        self.sources = [other for other in range(len(nodes.of_ranks)) if nodes.partner_of(other) == rank]
        self._slots = {other: two_slots(folder, f"{fit}-{other}", kept) for other in self.sources}
        self._count = 0

    def exchange(self, slot: Slot | None, header: Header) -> bool:
        """Sends what is whole, or that there is nothing, and makes whole what comes; every rank calls it. Gives whether
        there was room for it.
        """
        pieces = [torch.zeros(PAGE, dtype=torch.uint8)]
        if slot is not None:
            page, content = slot.whole(header)
            pieces = [page, *content.split(PIECE)]
        sends = [dist.isend(piece, group=self._group, group_dst=self._to) for piece in pieces]
        kept = [self._receive(source) for source in self.sources]
        self._count += 1
        for send in sends:
            assert send is not None
            send.wait()
        return all(kept)

    def _receive(self, source: int) -> bool:
        page = torch.empty(PAGE, dtype=torch.uint8)
        dist.recv(page, group=self._group, group_src=source)
        header = Header.unpacked(page.numpy().tobytes())
        if header is None:
            return True
        slot, nbytes = self._slots[source][self._count % 2], header.nbytes - PAGE
        try:
            slot.open(header.nbytes)
            pieces = slot.memory[:nbytes].split(PIECE)
        except NoRoom as error:
            log.warning("no more snapshots are taken: %s", error)
            # it comes all the same
            scratch = torch.empty(min(PIECE, nbytes), dtype=torch.uint8)
            pieces = tuple(scratch[: nbytes - begin] for begin in range(0, nbytes, PIECE))
        for piece in pieces:
            dist.recv(piece, group=self._group, group_src=source)
        if len(slot.memory):
            slot.commit(header)
        return bool(len(slot.memory))
