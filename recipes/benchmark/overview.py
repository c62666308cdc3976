"""All benchmarks, one after the other, and one page of them: ``all.md`` to read, ``all.json`` to keep, ``all.png``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recipes.benchmark.device import add_device_argument
from recipes.benchmark.results import Line, draw, lines_of, machine, ratio_in_words, show

NAMES = ("data_parallel", "tensor_parallel", "pipeline", "checkpoint")
"""Those that compare this checkout with peers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/benchmark"), metavar="DIR", help="(default: outputs/benchmark)"
    )
    add_device_argument(parser)
    parser.add_argument("--quick", action="store_true", help="at most 3 minutes each on 2 cores")
    parser.add_argument("--names", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help="(default: all)")
    parser.add_argument(
        "--missing", action="store_true", help="measure what DIR does not have whole, and keep the rest"
    )


def measure_all(options: argparse.Namespace) -> int:
    """Runs each benchmark in a process of its own, and writes the page; what one leaves is in it, however it ended.

    Returns:
        1 if a line missed what it must reach, or a benchmark did not come to its end; else 0.
    """
    for name in options.names:
        if not (options.missing and _read(options.output, name).get("finished")):
            (options.output / f"{name}.json").unlink(missing_ok=True)  # of an earlier run
            run(name, [*_arguments(options), "--output", str(options.output)])
        write(options)
    lines = [line for name in options.names for line in lines_of(_read(options.output, name))]
    show(lines)
    unfinished = [name for name in options.names if not _read(options.output, name).get("finished")]
    if unfinished:
        print(f"did not come to their ends: {', '.join(unfinished)}", file=sys.stderr)
    print(f"wrote {options.output / 'all.md'}")
    return int(bool(unfinished) or any(line.verdict == "missed" for line in lines))


def run(name: str, arguments: Sequence[str]) -> int:
    """A benchmark in a process of its own, so that none finds what another left; its exit status."""
    return subprocess.run([sys.executable, "-m", "recipes.benchmark", name, *arguments], check=False).returncode


def write(options: argparse.Namespace) -> None:
    """The page of what there is so far."""
    command = ["python -m recipes.benchmark all", *_arguments(options)]
    if tuple(options.names) != NAMES:
        command += ["--names", *options.names]
    about: dict[str, Any] = {
        "command": " ".join(command),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": machine(),
    }
    results = {name: _read(options.output, name) for name in options.names}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "all.json").write_text(json.dumps({**about, "benchmarks": results}, indent=1))
    (options.output / "all.md").write_text(page(about, results))
    draw([line for result in results.values() for line in lines_of(result)], options.output / "all.png")


def page(about: dict[str, Any], results: dict[str, Any]) -> str:
    """Markdown: what was run where, then a table for each group of lines."""
    machine_ = ", ".join(f"{key} {value}" for key, value in about["machine"].items() if key != "load")
    rows = ["# Beside its peers", "", f"`{about['command']}`, {about['date']}; {machine_}.", ""]
    rows.append(
        "Times are minimum / median; a ratio is ours over the peer's, by both. Below 1, ours is faster or smaller."
    )
    for name, result in results.items():
        rows += ["", f"## {name}", ""]
        if not result.get("finished"):
            rows += ["It did not come to its end." if result else "Not measured.", ""]
        lines = lines_of(result)
        for group in dict.fromkeys(line.group for line in lines):
            rows += [f"**{group}**", "", "| what | ours | peer | ratio | must | |", "|---|---:|---:|---:|---:|---|"]
            rows += [_row(line) for line in lines if line.group == group] + [""]
    return "\n".join(rows).rstrip() + "\n"


def _row(line: Line) -> str:
    must = "" if line.at_most is None else f"at most {line.at_most:g}"
    cells = (line.what, line.ours, line.peer, ratio_in_words(line), must, line.verdict)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _arguments(options: argparse.Namespace) -> list[str]:
    return [
        *(["--quick"] if options.quick else []),
        *(["--device", options.device] if options.device != "auto" else []),
    ]


def _read(folder: Path, name: str) -> dict[str, Any]:
    file = folder / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else {}
