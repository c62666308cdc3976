"""``lightning-dist verify``: options, what is shown while it runs, exit status."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from lightning_dist.elastic import is_launched
from lightning_dist.explain import Target, find_in_project, find_recipes, module_maker, parse_arguments
from lightning_dist.verify.results import LayoutResult, Verification
from lightning_dist.verify.verification import verify

_STATUS = (
    "Exit status 0: every layout has the numbers of one process, or is refused with a sentence; 1: one differs or "
    "fails, or with --strict is refused; 2: a mistake in what was asked."
)


def add_verify(commands: Any) -> None:
    """Adds the subcommand to what ``add_subparsers`` gave."""
    parser = commands.add_parser(
        "verify",
        help="train your own module some steps under layouts, and compare with one process",
        description="Trains a module some steps in one process and under each layout, on the same batches, and shows "
        "losses, gradient norms, weights, logged values and those of a validation side by side. Where they differ it "
        "names the first module whose output or gradient does. Starts its ranks itself. " + _STATUS,
    )
    parser.add_argument(
        "what",
        nargs="*",
        metavar="WHAT",
        help="package.module:Class of a LightningModule and its arguments as name=value; or overrides of a recipe, as "
        "for python -m recipes.train; with --zoo, names of networks (with *)",
    )
    parser.add_argument("--layouts", nargs="+", metavar="LAYOUT", help="such as dp_shard=2 tp=2,pp=2")
    zoo = "verify networks of others that the project names, in place of WHAT, and write a table to outputs/zoo"
    parser.add_argument("--zoo", action="store_true", help=zoo)
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="DATA",
        help="package.module:DataModule, or a function that gives a loader, and its arguments as name=value (default: "
        "the module's own loaders, or those of the recipe)",
    )
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="of the optimizer (default: 4)")
    validation = "of each validation loader, after the steps; 0: none (default: 5)"
    parser.add_argument("--validation-batches", type=int, default=5, metavar="N", help=validation)
    parser.add_argument("--seed", type=int, default=0, help="before the module is made (default: 0)")
    parser.add_argument("--precision", default="64-true", help="of the Trainer (default: 64-true)")
    parser.add_argument("--tolerance", type=float, metavar="X", help="relative difference that is rounding")
    parser.add_argument(
        "--strategy", nargs="+", default=[], metavar="name=value", help="arguments of HybridStrategy beside its layout"
    )
    more = "arguments of the Trainer, such as accumulate_grad_batches=2 gradient_clip_val=1.0; can be given again"
    parser.add_argument("--trainer", nargs="+", action="extend", default=[], metavar="name=value", help=more)
    parser.add_argument("--accelerator", choices=["auto", "cpu"], default="auto", help="cpu: leave accelerators alone")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="for each training (default: 300)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it for machines")
    parser.add_argument("--strict", action="store_true", help="a layout that is refused is exit status 1 too")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Exit status, see the description of the command.

    Raises:
        ValueError: options that can't be.
    """
    if is_launched():
        raise ValueError("verify starts its ranks itself; run it as one process, without torchrun")
    if options.timeout <= 0:
        raise ValueError(f"--timeout is {options.timeout:g}; the ranks need some seconds to answer")
    if options.zoo:
        table = find_in_project(Path.cwd(), "zoo")
        return table(options.what, options.layouts, accelerator=options.accelerator, timeout=options.timeout)
    if not options.what or not options.layouts:
        raise ValueError("name a module as package.module:Class, or overrides of a recipe, and --layouts")
    sys.path.insert(0, os.getcwd())  # as for python -m
    make_module, make_data, trainer = _subject(options)
    shown = _Shown()
    found = verify(
        make_module,
        make_data,
        options.layouts,
        steps=options.steps,
        validation_batches=options.validation_batches,
        seed=options.seed,
        precision=options.precision,
        tolerance=options.tolerance,
        accelerator=options.accelerator,
        timeout=options.timeout,
        trainer={**trainer, **parse_arguments(options.trainer)},
        strategy=parse_arguments(options.strategy),
        on_begin=shown.begin,
    )
    shown.end(found)
    if options.json is not None:
        options.json.write_text(json.dumps(found.as_dict(), indent=2) + "\n")
    return 0 if found.is_same and not (options.strict and found.is_refused) else 1


@dataclass(frozen=True)
class _OfRecipe:
    """Makes what a recipe is made of, in any process."""

    directory: Path
    overrides: tuple[str, ...]
    part: Literal["make", "data"]

    def __call__(self) -> Any:
        make = getattr(find_recipes(self.directory)([*self.overrides]), self.part)
        return None if make is None else make()


def _subject(options: argparse.Namespace) -> tuple[Callable[[], Any], Callable[[], Any] | None, Mapping[str, Any]]:
    """What makes the module and its data, and arguments of the Trainer."""
    make_data = None
    if options.data:
        make_data = Target(options.data[0], parse_arguments(options.data[1:])).validate()
    if ":" in options.what[0] and "=" not in options.what[0]:
        return module_maker(options.what[0], parse_arguments(options.what[1:]), "verified"), make_data, {}
    here, overrides = Path.cwd(), tuple(options.what)
    subject = find_recipes(here)([*overrides])
    trainer = {name: value for name, value in subject.trainer.items() if name != "precision"}
    return _OfRecipe(here, overrides, "make"), make_data or _OfRecipe(here, overrides, "data"), trainer


class _Shown:
    """What is being done in a terminal, or line after line without one; at the end the tables."""

    def __init__(self) -> None:
        self._console = Console()
        self._status = self._console.status("one process")
        self._num_told = 0
        if self._console.is_terminal:
            self._status.start()

    def begin(self, found: Verification, layout: str) -> None:
        self._tell(found)
        self._status.update(layout)

    def end(self, found: Verification) -> None:
        self._tell(found)
        self._status.stop()
        self._console.print(found.table())
        for result in found.results:
            if result.trace:
                self._console.print(f"\n{result.layout}:\n{result.trace.rstrip()}", markup=False, highlight=False)

    def _tell(self, found: Verification) -> None:
        for result in found.results[self._num_told :]:
            if not self._console.is_terminal:
                self._console.print(_line(result), markup=False, soft_wrap=True)
        self._num_told = len(found.results)


def _line(result: LayoutResult) -> str:
    return f"{result.layout}: {result.status}: {result.sentence}"
