"""``python -m recipes.benchmark NAME [options]``: measures, shows and saves; the status is 1 if a must was missed."""

from __future__ import annotations

import argparse
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from recipes.benchmark import overview
from recipes.benchmark.results import Record, machine

BENCHMARKS = {
    "checkpoint": "saves against torch.distributed.checkpoint alone, and in the background",
    "data_parallel": "replicate and shard against Lightning's ddp and fully_shard by hand",
    "pipeline": "transformers' Llama against a pipeline of torch's stages by hand",
    "tensor_parallel": "transformers' Llama against the plan of torch's tutorial and transformers' own",
    "versions": "this lightning_dist against that of another checkout",
}
"""Modules of this package with ``add_arguments``, ``measure`` and ``QUICK``, the defaults under ``--quick``; and what
they compare."""


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmark", description="What the product costs.")
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    overview.add_arguments(names.add_parser("all", help="each of them that has peers, and one page of all"))
    for name, compares in BENCHMARKS.items():
        add_options(names.add_parser(name, help=compares, description=compares), name, "--quick" in arguments)
    options = parser.parse_args(arguments)
    if options.name == "all":
        return overview.measure_all(options)
    record = Record(options.output, options.name, {"options": vars(options), "before": machine()})
    finished = False
    before = signal.signal(signal.SIGTERM, _end)
    try:
        module_of(options.name).measure(options, record)
        finished = True
    finally:
        record.close(finished)
        signal.signal(signal.SIGTERM, before)
    return int(any(line.verdict == "missed" for line in record.lines))


def module_of(name: str) -> Any:
    """The module of a benchmark."""
    return import_module(f"recipes.benchmark.{name}")


def add_options(parser: argparse.ArgumentParser, name: str, quick: bool) -> None:
    """Those of every benchmark and those of this one.

    Args:
        parser: of the benchmark.
        name: of the benchmark.
        quick: the defaults are those of ``--quick``.
    """
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/benchmark"),
        metavar="DIR",
        help="folder for NAME.json and NAME.png (default: outputs/benchmark)",
    )
    module = module_of(name)
    module.add_arguments(parser)
    smaller = ", ".join(f"{option}={value}" for option, value in module.QUICK.items())
    parser.add_argument("--quick", action="store_true", help=f"at most 3 minutes on 2 cores: {smaller}, unless given")
    if quick:
        parser.set_defaults(**module.QUICK)


def _end(number: int, frame: object) -> None:
    """As an interrupt would: what was started is ended, and what was measured is kept."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
