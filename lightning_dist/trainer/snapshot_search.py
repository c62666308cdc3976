"""The newest snapshot that all ranks together have whole, found when ranks start again.

[Note: parts that are lost]
Where a node and its partner are lost together, what they held of parameters and optimizer states may still be there,
in the parts of other replicas. Of the lost ranks' random states and loaders nothing is: they draw anew, and take the
place in the data that all have. Where loaders keep a place of their own on each rank, a fit goes on from a checkpoint.
"""

from __future__ import annotations

import os
import pickle
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_dist.checkpoint.locations import SNAPSHOT
from lightning_dist.checkpoint.slots import PIECE, Header, is_intact, read_header, read_part, reserve
from lightning_dist.checkpoint.snapshot_read import PART, Info
from lightning_dist.collectives import gather_objects, global_rank
from lightning_dist.data.position import keeps_a_place
from lightning_dist.elastic.states import SavedState
from lightning_dist.trainer.resume_entry import RESUME, joined


@dataclass(frozen=True)
class Nodes:
    """On which machine each rank is; ranks that see the same directory in memory are on one."""

    of_ranks: list[int]
    here: int

    @classmethod
    def of(cls, directory: Path) -> Nodes:
        """One all-gather of a path and the machine's name."""
        every = gather_objects(f"{socket.gethostname()}:{directory}")
        names = list(dict.fromkeys(every))
        of_ranks = [names.index(name) for name in every]
        return cls(of_ranks, of_ranks[global_rank()])

    @property
    def count(self) -> int:
        """Of nodes."""
        return len(set(self.of_ranks))

    def ranks_of(self, node: int) -> list[int]:
        """Those on a node."""
        return [rank for rank, other in enumerate(self.of_ranks) if other == node]

    @property
    def is_first(self) -> bool:
        """Whether this rank is the first one of its node."""
        return self.beside[0] == global_rank()

    @property
    def beside(self) -> list[int]:
        """The ranks on this node, this one too."""
        return self.ranks_of(self.here)

    def keeps(self, rank: int) -> bool:
        """Whether this node keeps a rank's part: its own, or a partner's."""
        return rank in self.beside or self.partner_of(rank) in self.beside

    def partner_of(self, rank: int) -> int:
        """The rank on the next node that keeps a copy of this one's part."""
        node = self.of_ranks[rank]
        others = self.ranks_of((node + 1) % self.count)
        return others[min(self.ranks_of(node).index(rank), len(others) - 1)]


OF_STEP = "-of-step-"
"""In the name of a directory of links to a snapshot's parts."""

Files = dict[int, dict[int, str]]
"""For each rank that wrote a part, the name of its file by node."""


@dataclass(frozen=True)
class Found:
    """What a fit can go on from, and which snapshot that is; the number of this attempt among those that took any."""

    state: SavedState | None
    order: tuple[int, int] | None
    attempt: int


def find_snapshot(folder: Path, fit: str, nodes: Nodes, arrangement: str, group: Any, in_parts: bool) -> Found:
    """The newest snapshot of a fit whose parts are all there and intact, on this node or another, or of which the parts
    that are there have all; see [Note: parts that are lost].

    Every rank calls it. What a node lacks is sent, over the group: all parts, but where the module is read ``in_parts``
    by ranks that stand as those stood that wrote it; they need what was on their own node.

    Communication: all-gathers of names and headers of files, of what was found damaged, and of each rank's random
    states and place in its data (10 kB); what a node lacks, from one rank to one.
    """
    mine = {file.name: header for file in sorted(folder.iterdir()) if (header := _header_of(file, fit)) is not None}
    by_node = dict(zip(nodes.of_ranks, gather_objects(mine), strict=True))
    attempt = 1 + max((header.order[0] for headers in by_node.values() for header in headers.values()), default=0)
    damaged: set[tuple[int, str]] = set()
    while (newest := _newest(by_node, damaged)) is not None:
        header, files = newest
        is_same = header.arrangement == arrangement and len(files) == header.num_ranks
        sources = _sources(files, nodes, is_same and in_parts)
        found = _damaged_here(sources, files, nodes, folder)
        every = {name for of_rank in gather_objects(found) for name in of_rank}
        if not every:
            place = folder / f"{fit}{OF_STEP}{header.step}"
            if _assemble(place, sources, files, nodes, is_same, group):
                return Found(SavedState(str(place), header.step, header.batches, header.time), header.order, attempt)
            every = {(node, name) for by_node_of_rank in files.values() for node, name in by_node_of_rank.items()}
        damaged |= every
    return Found(None, None, attempt)


def _header_of(file: Path, fit: str) -> Header | None:
    header = read_header(file) if file.is_file() else None
    return header if header is not None and header.fit == fit else None


def _newest(by_node: dict[int, dict[str, Header]], damaged: set[tuple[int, str]]) -> tuple[Header, Files] | None:
    """The header of a part of the newest snapshot that is there, and the files of all."""
    found: dict[tuple[int, int], tuple[dict[int, Header], Files]] = {}
    for node, headers in by_node.items():
        for name, header in headers.items():
            if (node, name) not in damaged:
                of_ranks, files = found.setdefault(header.order, ({}, {}))
                of_ranks[header.rank] = header
                files.setdefault(header.rank, {})[node] = name
    # one that is there with all parts goes on to the bit, and is at most a snapshot older
    complete = [order for order, (of_ranks, _) in found.items() if _is_complete(of_ranks)]
    whole = complete or [order for order, (of_ranks, _) in found.items() if _is_whole(of_ranks)]
    if not whole:
        return None
    of_ranks, files = found[max(whole)]
    return next(iter(of_ranks.values())), files


def _is_complete(of_ranks: dict[int, Header]) -> bool:
    return len(of_ranks) == next(iter(of_ranks.values())).num_ranks


def _is_whole(of_ranks: dict[int, Header]) -> bool:
    """Whether parts of these ranks have, of each place, what all who hold it on some node wrote."""
    places = {header.place for header in of_ranks.values() if of_ranks.keys() >= set(header.holders)}
    return len(places) == next(iter(of_ranks.values())).num_places


def _sources(files: Files, nodes: Nodes, in_parts: bool) -> dict[tuple[int, int], int]:
    """From which node comes what a node needs, by that and the rank that wrote the part: its own, or the first."""
    needs = [(node, rank) for node in range(nodes.count) for rank in (nodes.ranks_of(node) if in_parts else files)]
    return {(node, rank): node if node in files[rank] else min(files[rank]) for node, rank in sorted(needs)}


def _damaged_here(
    sources: dict[tuple[int, int], int], files: Files, nodes: Nodes, folder: Path
) -> set[tuple[int, str]]:
    """What this rank finds damaged of the files that are used of its node; its ranks look at them in turn."""
    used = sorted({files[rank][nodes.here] for (_, rank), source in sources.items() if source == nodes.here})
    mine = used[nodes.beside.index(global_rank()) :: len(nodes.beside)]
    return {(nodes.here, name) for name in mine if not is_intact(folder / name)}


def _assemble(
    place: Path, sources: dict[tuple[int, int], int], files: Files, nodes: Nodes, is_same: bool, group: Any
) -> bool:
    """Brings the parts that this node needs to one directory, from which it is read as a checkpoint. False where a lost
    rank's loader had a place of its own.
    """
    is_first, folder = nodes.is_first, place.parent
    if is_first:
        for earlier in folder.glob(f"*{OF_STEP}*"):  # of an attempt that ended while it read
            shutil.rmtree(earlier)
        place.mkdir()
        for (node, rank), source in sources.items():
            if node == source == nodes.here:
                os.link(folder / files[rank][node], place / f"{rank}{PART}")
    for path, sender, receiver in _transfers(place, sources, files, nodes):
        _send(path, sender, receiver, group)
    parts = [place / f"{global_rank()}{PART}"] if is_same else []
    gather_objects(None)  # the files of this node are there
    if not is_same:
        parts = sorted(place.glob(f"*{PART}")) if is_first else []
    own = [read_part(path).small["own"] for path in parts]
    every = [part for of_rank in gather_objects(own if is_same or global_rank() == 0 else []) for part in of_rank]
    entry = joined(every)
    if lost := [rank for rank, states in enumerate(entry["random"]) if states is None]:
        if any(keeps_a_place(of_loader) for of_rank in every for of_loader in of_rank["loaders"]):
            if is_first:
                shutil.rmtree(place)
            return False
        rank_zero_info(
            f"the snapshot of step {place.name.rpartition('-')[2]} is put together from other replicas: the states of "
            f"the random generators of data ranks {lost} are lost, and they draw anew"
        )
    if is_first:
        (place / SNAPSHOT).write_bytes(pickle.dumps(Info(is_same, {RESUME: entry})))
    gather_objects(None)
    return True


def _transfers(
    place: Path, sources: dict[tuple[int, int], int], files: Files, nodes: Nodes
) -> Iterator[tuple[Path, int, int]]:
    """What goes from the first rank of a node to that of another, in the same order on all ranks."""
    for (node, rank), source in sources.items():
        if node != source:
            ends = nodes.ranks_of(source)[0], nodes.ranks_of(node)[0]
            path = place.parent / files[rank][source] if nodes.here == source else place / f"{rank}{PART}"
            yield path, *ends


def _send(path: Path, sender: int, receiver: int, group: Any) -> None:
    """Sends a file, by the sender and the receiver alone."""
    if global_rank() == sender:
        content = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
        dist.send_object_list([len(content)], receiver, group)
        for piece in content.split(PIECE):
            dist.send(piece, receiver, group)
    elif global_rank() == receiver:
        sizes: list[Any] = [None]
        dist.recv_object_list(sizes, sender, group)
        with path.open("wb") as file:
            reserve(file.fileno(), sizes[0])
        for piece in torch.from_file(str(path), shared=True, size=sizes[0], dtype=torch.uint8).split(PIECE):
            dist.recv(piece, sender, group)
