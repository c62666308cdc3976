"""The console command ``lightning-dist``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from lightning_dist.checkpoint import convert
from lightning_dist.data.tokens.command import add_data, add_tokenize
from lightning_dist.doctor.command import add_doctor
from lightning_dist.elastic.run import add_run
from lightning_dist.elastic.store import add_store
from lightning_dist.explain import (
    Subject,
    build_deferred,
    find_in_project,
    find_recipes,
    module_maker,
    parse_arguments,
)
from lightning_dist.explain.dry_run import dry_run
from lightning_dist.explain.measured import measured_peak
from lightning_dist.layout import MESH_AXES, REST, Layout
from lightning_dist.ranks import resolve
from lightning_dist.strategy import HybridStrategy
from lightning_dist.verify.command import add_verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; a mistake of the user's is one line and exit status 2, a check that failed is 1."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError) as error:
        print(f"lightning-dist: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lightning-dist", description="Layouts, checkpoints, and this machine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    layout = commands.add_parser("layout", help="resolve a layout and show which rank does what")
    layout.add_argument("layout", help='degrees by axis, such as "dp_replicate=2,dp_shard=-1"')
    layout.add_argument("--ranks", type=int, required=True, help="processes of the whole run")
    layout.set_defaults(run=_layout)

    explain = commands.add_parser("explain", help="show what a layout would do to a module, without training")
    what = (
        "package.module:Class of a LightningModule and its arguments as name=value; or overrides of a recipe, as for "
    )
    explain.add_argument("what", nargs="*", metavar="WHAT", help=what + "python -m recipes.train")
    explain.add_argument("--layout", help="for a class: degrees by axis (a recipe has strategy.layout)")
    explain.add_argument("--ranks", type=int, help="processes of the whole run; by default those of layout or recipe")
    explain.add_argument("--sequence-parallel", action="store_true", help="of a class: divide positions between blocks")
    told = "also run steps without memory or other processes, and show what a rank holds at its peak, and for what"
    explain.add_argument("--memory", action="store_true", help=told)
    explain.add_argument(
        "--run", dest="run_steps", action="store_true", help="with --memory: run the steps here too, and measure"
    )
    explain.set_defaults(run=_explain)

    convert = commands.add_parser("convert", help="write a checkpoint, or weights, in another form")
    source = "checkpoint of ours or of Lightning, or weights as transformers, timm and torchvision write"
    convert.add_argument("source", metavar="SRC", help=source)
    convert.add_argument("destination", metavar="DST", help="file or directory to write")
    forms = "lightning", "sharded", "safetensors", "transformers"
    to = "Lightning's single file (default), a directory of shards, weights alone, or a directory for from_pretrained"
    convert.add_argument("--to", choices=forms, default="lightning", help=to)
    prefix = "of names in the module, such as model., that published weights do not have"
    convert.add_argument("--prefix", help=f"{prefix} (default for transformers: where its model is in the module)")
    convert.add_argument("--config", help="for transformers: config.json, or a directory that has it")
    largest = "of safetensors, before another (default: 5)"
    convert.add_argument("--largest-file", type=float, default=5.0, metavar="GB", help=largest)
    convert.add_argument("--overwrite", action="store_true", help="replace DST if it is there")
    convert.add_argument("--trust", action="store_true", help="load objects that execute code from the checkpoint")
    convert.set_defaults(run=_convert)

    _add_of_project(commands)
    add_tokenize(commands)
    add_data(commands)
    add_verify(commands)
    add_doctor(commands)
    add_run(commands)
    add_store(commands)
    return parser


def _add_of_project(commands: Any) -> None:
    """What the ``pyproject.toml`` of a project of recipes names."""
    told = "run experiments of the project over layouts and seeds, and say whether they reach what they should"
    # what looks like an option is the project's
    reproduce = commands.add_parser("reproduce", help=told, add_help=False, prefix_chars="\0")
    reproduce.add_argument("arguments", nargs="*")
    reproduce.set_defaults(run=lambda options: find_in_project(Path.cwd(), "reproduce")(options.arguments))

    told = "the jobs of sweeps of the project as a table and a page, made anew from their directories"
    report = commands.add_parser("report", help=told)
    report.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="of a sweep; several are compared")
    where = "the page to write (default: report.html in the directory of a single sweep)"
    report.add_argument("--output", type=Path, metavar="FILE", help=where)
    report.set_defaults(run=_report)


def _layout(options: argparse.Namespace) -> None:
    asked = Layout.parse(options.layout)
    if asked is None:
        raise ValueError("layout 'auto' is chosen for a module when it trains; name the axes here")
    if options.ranks < 1:
        raise ValueError(f"--ranks is {options.ranks}; a run has at least one process")
    resolved = asked.resolve(options.ranks)
    table = Table(title=f"{resolved} on {options.ranks} ranks", title_justify="left")
    axes = [axis for axis in MESH_AXES if getattr(resolved, axis) > 1]
    for column in ("rank", *axes, "data rank"):
        table.add_column(column, justify="right")
    for rank in range(options.ranks):
        place = resolved.coordinates(rank)
        table.add_row(str(rank), *(str(place[axis]) for axis in axes), str(resolved.data_rank(rank)))
    Console().print(table)


def _explain(options: argparse.Namespace) -> None:
    sys.path.insert(0, os.getcwd())  # as for python -m
    names_class = bool(options.what) and ":" in options.what[0] and "=" not in options.what[0]
    subject = _subject_of_class(options) if names_class else _subject_of_recipe(options)
    strategy, first_batch = subject.strategy, subject.first_batch
    if not isinstance(strategy, HybridStrategy):
        raise ValueError(f"{type(strategy).__name__} has no layout to explain; choose strategy=hybrid")
    num_ranks = options.ranks or subject.num_ranks
    module = build_deferred(subject.make)
    asked = strategy.ranks.requested
    has_pipeline = asked is not None and resolve(asked, num_ranks).pp > 1
    batch = first_batch() if first_batch is not None and (has_pipeline or options.memory) else None
    report = strategy.explain(module, num_ranks, batch)
    report.print()
    if options.memory:
        batch = _batch_of_loader(module) if batch is None else batch
        how = subject.make, strategy
        # first: a process that has run a backward pass, which fakes have too, can't be forked
        measured = measured_peak(*how, num_ranks, batch, subject.trainer) if options.run_steps else None
        replace(dry_run(*how, report.layout, batch, subject.trainer), measured=measured).print()


def _batch_of_loader(module: pl.LightningModule) -> Any:
    if not is_overridden("train_dataloader", module):
        raise ValueError(
            "--memory runs steps on a batch, and there is none; give the module a train_dataloader, or explain a recipe"
        )
    module.prepare_data()
    module.setup("fit")
    return next(iter(module.train_dataloader()))


def _subject_of_class(options: argparse.Namespace) -> Subject:
    make = module_maker(options.what[0], parse_arguments(options.what[1:]))
    if not options.layout:
        raise ValueError("--layout is missing, such as --layout dp_shard=2,tp=2")
    strategy = HybridStrategy(options.layout, sequence_parallel=options.sequence_parallel)
    return Subject(make, strategy, options.ranks or _fewest_ranks(options.layout))


def _subject_of_recipe(options: argparse.Namespace) -> Subject:
    if options.layout or options.sequence_parallel:
        raise ValueError(
            "--layout and --sequence-parallel are for a class; a recipe takes overrides, such as strategy.layout.tp=2"
        )
    return find_recipes(Path.cwd())(options.what)


def _fewest_ranks(layout: str) -> int:
    asked = Layout.parse(layout)
    if asked is None or REST in dict(asked.items()).values():
        raise ValueError(f"--ranks is missing: layout {layout!r} takes as many as there are")
    return asked.world_size


def _report(options: argparse.Namespace) -> None:
    find_in_project(Path.cwd(), "report")(options.directories, options.output)


def _convert(options: argparse.Namespace) -> None:
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(TextColumn("converted"), *columns) as progress:
        task = progress.add_task("converted", total=None)
        convert(
            options.source,
            options.destination,
            to=options.to,
            prefix=options.prefix,
            config=options.config,
            largest_file=int(options.largest_file * 1e9),
            overwrite=options.overwrite,
            weights_only=False if options.trust else None,
            progress=lambda written, total: progress.update(task, completed=written, total=total),
        )
    print(f"wrote {options.destination}")
