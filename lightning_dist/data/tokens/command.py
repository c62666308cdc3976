"""``lightning-dist tokenize``, and what looks after data: options, progress, exit status."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from lightning_dist.data.shards.command import add_index, check_shards
from lightning_dist.data.shards.index import INDEX as SHARDS
from lightning_dist.data.tokens.check import check_store, drop_shards
from lightning_dist.data.tokens.tokenization import tokenize


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
    if len(options.places) > 1 or not _is_token_store(options.places[0]):
        return check_shards(options.places, options.drop)
    options.store = Path(options.places[0])
    with Progress(TextColumn("read"), BarColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("read", total=None)
        index, damaged = check_store(
            options.store, lambda done, total: progress.update(task, completed=done, total=total)
        )
    if not damaged:
        print(f"all {len(index.shards):,} shards of {options.store} are as they were written")
        return 0
    table = Table("shard", "what is wrong", "tokens", title=f"damaged in {options.store}", title_justify="left")
    for damage in damaged:
        table.add_row(damage.shard.name, damage.what, f"{damage.shard.num_tokens:,}")
    Console().print(table)
    lost = sum(damage.shard.num_tokens for damage in damaged)
    share = f"{len(damaged):,} of {len(index.shards):,} shards, {lost / index.num_tokens:.2%} of the tokens"
    if options.drop:
        drop_shards(options.store, index, damaged)
        print(f"dropped {share}; the store is the rest")
        return 0
    print(f"`lightning-dist data check {options.store} --drop` would leave out {share}")
    return 1


def _is_token_store(place: str) -> bool:
    """Whether a place is to be a token store: what is of no shards."""
    if "://" in place or "*" in place or place.endswith((".json", ".tar", ".parquet")):
        return False
    return not (Path(place).expanduser() / SHARDS).exists()
