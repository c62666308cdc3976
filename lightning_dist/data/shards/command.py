"""``lightning-dist data index``, and ``lightning-dist data check`` of shards: options, progress, exit status."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lightning_dist.data.shards.check import DamagedFile, check_index, drop_shards, scan_shards
from lightning_dist.data.shards.index import INDEX, index_place, refuse_read_only, write_index


def add_index(actions: Any) -> None:
    """Adds the action to what ``add_subparsers`` gave."""
    index = actions.add_parser(
        "index",
        help="write the index of tar or Parquet shards that training reads",
        description="Reads shards once and writes their sizes, checksums and numbers of samples, which "
        "lightning_dist.data.ShardDataset reads in their place. Exit status 1 if a shard is damaged, which is written "
        "down with --drop alone.",
    )
    what = "shards, patterns as train-{000..127}.tar or '*.parquet', or directories; paths or URLs"
    index.add_argument("sources", nargs="+", metavar="SRC", help=what)
    index.add_argument("--output", metavar="FILE", help=f"the index (default: {INDEX} beside the first shard)")
    index.add_argument("--drop", action="store_true", help="write the index without shards that are damaged")
    index.set_defaults(run=_index)


def _index(options: argparse.Namespace) -> int:
    with _progress() as progress:
        place, index, damaged = scan_shards(options.sources, options.output, progress)
    num_shards = len(index.shards) + len(damaged)
    if damaged:
        show_damaged(damaged, f"{num_shards:,} shards")
        if not options.drop or not index.shards:
            print(f"no index is written; with --drop it would have the other {len(index.shards):,} shards")
            return 1
    write_index(place, index)
    print(f"{place} has {index.num_samples:,} samples of {len(index.shards):,} shards")
    return 0


def check_shards(places: Sequence[str], drop: bool) -> int:
    """Checks an index of shards, or shards that have none; returns the exit status."""
    if len(places) == 1 and not places[0].endswith((".tar", ".parquet")) and "*" not in places[0]:
        return _check_index(places[0], drop)
    if drop:
        raise ValueError("--drop leaves shards out of an index, and these have none; `lightning-dist data index` them")
    with _progress() as progress:
        _, index, damaged = scan_shards(places, None, progress, is_written=False)
    if damaged:
        show_damaged(damaged, "shards")
        print(f"leave out {len(damaged):,} of {len(index.shards) + len(damaged):,} shards, or get them again")
        return 1
    print(f"all {len(index.shards):,} shards can be read; they have {index.num_samples:,} samples")
    return 0


def _check_index(place: str, drop: bool) -> int:
    if drop:
        refuse_read_only(index_place(place))
    with _progress() as progress:
        index, damaged = check_index(place, progress)
    if not damaged:
        print(f"all {len(index.shards):,} shards of {place} are as they were indexed")
        return 0
    show_damaged(damaged, place)
    lost = sum(damage.num_samples for damage in damaged)
    share = f"{len(damaged):,} of {len(index.shards):,} shards, {lost / index.num_samples:.2%} of the samples"
    if drop:
        drop_shards(place, index, damaged)
        print(f"dropped {share}; the index has the rest")
        return 0
    print(f"`lightning-dist data check {place} --drop` would leave out {share}")
    return 1


def show_damaged(damaged: Sequence[DamagedFile], where: str) -> None:
    """Prints a table of them."""
    table = Table("what is wrong", "samples", title=f"damaged in {where}", title_justify="left")
    for damage in damaged:
        table.add_row(damage.what, f"{damage.num_samples:,}" if damage.num_samples else "unknown")
    Console().print(table)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar of shards that were read; what moves it."""
    with Progress(TextColumn("read"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("read", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
