"""``lightning-dist tokenize``, and what looks after data: options, progress, exit status."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from lightning_dist.data.folders import files_below
from lightning_dist.data.shards.command import add_index, check_shards
from lightning_dist.data.shards.index import INDEX as SHARDS
from lightning_dist.data.shards.index import KINDS as SHARD_KINDS
from lightning_dist.data.tokens.check import check_store, drop_shards
from lightning_dist.data.tokens.format import INDEX, TOKENIZER
from lightning_dist.data.tokens.tokenization import tokenize
from lightning_dist.data.tokens.writer import JOURNAL


def add_tokenize(commands: Any) -> None:
    """Adds the subcommand to what ``add_subparsers`` gave."""
    command = commands.add_parser(
        "tokenize",
        help="write text as a store of tokens that training reads",
        description="Encodes text in parallel into a store that lightning_dist.data.TokenDataset reads. A command that "
        "was interrupted goes on where it was when it is given again, to the same bytes.",
    )
    kinds = "text files, JSON lines (.jsonl, .json; .gz) or .parquet, or folders of them"
    command.add_argument("sources", nargs="+", metavar="SRC", help=kinds)
    command.add_argument("destination", metavar="DST", help="directory of the store")
    what = "tokenizer.json of the library tokenizers, or a directory that has one"
    command.add_argument("--tokenizer", required=True, metavar="FILE", help=what)
    command.add_argument("--workers", type=int, metavar="N", help="processes that encode (default: one for each core)")
    most = "tokens of a shard at most (default: %(default)s)"
    command.add_argument("--shard-tokens", type=int, default=1 << 26, metavar="N", help=most)
    named = "of JSON lines, or column of tables, with the text (default: %(default)s)"
    command.add_argument("--field", default="text", help=named)
    command.add_argument("--pattern", help="of names of files in folders, such as '*.py' (default: the kinds above)")
    command.add_argument(
        "--end-of-document", metavar="TOKEN", help="token after each document, such as '<|endoftext|>'"
    )
    command.set_defaults(run=_tokenize)


def add_data(commands: Any) -> None:
    """Adds the subcommand to what ``add_subparsers`` gave."""
    data = commands.add_parser("data", help="look after data that training reads")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    add_index(actions)
    check = actions.add_parser(
        "check",
        help="find damaged shards of a token store, or of tar and Parquet files",
        description="Compares every file with the checksum that was written; shards without an index are read as far "
        "as they can be. Exit status 1 if a shard is damaged and was not dropped.",
    )
    what = "directory of a token store; or an index of shards, its directory, or shards themselves, paths or URLs"
    check.add_argument("places", nargs="+", metavar="DST", help=what)
    check.add_argument("--drop", action="store_true", help="leave damaged shards out of the index from now on")
    check.set_defaults(run=_check)


def _tokenize(options: argparse.Namespace) -> None:
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(TextColumn("tokenized"), *columns) as progress:
        task = progress.add_task("tokenized", total=None)
        index = tokenize(
            options.sources,
            options.destination,
            options.tokenizer,
            workers=options.workers,
            shard_tokens=options.shard_tokens,
            field=options.field,
            pattern=options.pattern,
            end_of_document=options.end_of_document,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            report=lambda text: print(f"lightning-dist: {text}", file=sys.stderr),
        )
    print(
        f"{options.destination} has {index.num_tokens:,} tokens of {index.num_documents:,} documents in "
        f"{len(index.shards):,} shards"
    )


def _check(options: argparse.Namespace) -> int:
    """Each place by its own kind; shards without an index together."""
    stores = [place for place in options.places if _is_token_store(place)]
    others = [place for place in options.places if place not in stores]
    indexes = [place for place in others if place.endswith(".json") or _in(place, SHARDS)]
    shards = [place for place in others if place not in indexes]
    found = [check_shards(shards, options.drop)] if shards else []  # first, since nothing can be dropped of them
    found += [_check_store(place, options.drop) for place in stores]
    return max(found + [check_shards([place], options.drop) for place in indexes])


def _check_store(place: str, drop: bool) -> int:
    with Progress(TextColumn("read"), BarColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("read", total=None)
        index, damaged = check_store(place, lambda done, total: progress.update(task, completed=done, total=total))
    if not damaged:
        dropped = f"; {len(index.dropped):,} were dropped" if index.dropped else ""
        print(f"all {len(index.shards):,} shards of {place} are as they were written{dropped}")
        return 0
    table = Table("shard", "what is wrong", "tokens", title=f"damaged in {place}", title_justify="left")
    shards = [damage.shard for damage in damaged if damage.shard is not None]
    for damage in damaged:
        cells = (damage.shard.name, damage.what, f"{damage.shard.num_tokens:,}") if damage.shard else ("", damage.what)
        table.add_row(*cells)
    Console().print(table)
    if len(shards) < len(damaged):
        print(f"copy the tokenizer that made the tokens to {Path(place) / TOKENIZER}")
    lost = sum(shard.num_tokens for shard in shards)
    share = f"{len(shards):,} of {len(index.shards):,} shards, {lost / index.num_tokens:.2%} of the tokens"
    if shards and drop:
        drop_shards(place, index, damaged)
        print(f"dropped {share}; the store is the rest")
    elif shards:
        print(f"`lightning-dist data check {place} --drop` would leave out {share}")
    return 0 if drop and len(shards) == len(damaged) else 1


def _is_token_store(place: str) -> bool:
    """Whether a place is to be a token store: what is of no shards."""
    if "://" in place or "*" in place or place.endswith((".json", *SHARD_KINDS)) or _in(place, SHARDS):
        return False
    folder = Path(place).expanduser()
    if _in(place, INDEX) or _in(place, JOURNAL) or not folder.is_dir():
        return True
    return not any(path.name.endswith(tuple(SHARD_KINDS)) for path in files_below(folder))


def _in(place: str, name: str) -> bool:
    return "://" not in place and (Path(place).expanduser() / name).exists()
