"""``python -m recipes.benchmark NAME [options]``: measures, shows and saves; the status is 1 if a must was missed."""

from __future__ import annotations

import argparse
import signal
import sys
from importlib import import_module
from pathlib import Path

from recipes.benchmark import results

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
    for name, compares in BENCHMARKS.items():
        sub = names.add_parser(name, help=compares, description=compares)
        sub.add_argument(
            "--output",
            type=Path,
            default=Path("outputs/benchmark"),
            metavar="DIR",
            help="folder for NAME.json and NAME.png (default: outputs/benchmark)",
        )
        module = import_module(f"recipes.benchmark.{name}")
        module.add_arguments(sub)
        smaller = ", ".join(f"{option}={value}" for option, value in module.QUICK.items())
        sub.add_argument("--quick", action="store_true", help=f"at most 3 minutes on 2 cores: {smaller}, unless given")
        if "--quick" in arguments:
            sub.set_defaults(**module.QUICK)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _end)
    about = {"options": vars(options), "before": results.machine()}
    record = results.Record(options.output, options.name, about)
    finished = False
    try:
        import_module(f"recipes.benchmark.{options.name}").measure(options, record)
        finished = True
    finally:
        record.close(finished)
    return int(any(line.verdict == "missed" for line in record.lines))


def _end(number: int, frame: object) -> None:
    """As an interrupt would: what was started is ended, and what was measured is kept."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
