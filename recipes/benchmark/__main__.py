"""``python -m recipes.benchmark NAME [options]``: measures, shows and saves; the status is 1 if a must was missed."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from recipes.benchmark import results

BENCHMARKS = {
    "checkpoint": "saves against torch.distributed.checkpoint alone, and in the background",
    "data_parallel": "replicate and shard against Lightning's ddp and fully_shard by hand",
    "pipeline": "transformers' Llama against a pipeline of torch's stages by hand",
    "tensor_parallel": "transformers' Llama against the plan of torch's tutorial and transformers' own",
}
"""Modules of this package with ``add_arguments`` and ``measure``, and what they compare."""


def main(arguments: list[str] | None = None) -> int:
    """The command."""
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
        import_module(f"recipes.benchmark.{name}").add_arguments(sub)
    options = parser.parse_args(arguments)
    before = results.machine()
    lines = import_module(f"recipes.benchmark.{options.name}").measure(options)
    results.show(lines)
    about = {"options": vars(options), "before": before, "after": results.machine()}
    results.save(lines, options.output, options.name, about)
    return int(any(line.verdict == "missed" for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
