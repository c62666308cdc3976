"""Runs experiments over layouts and seeds, and says whether they reach what their files expect.

``lightning-dist reproduce NAME...``, or ``python -m recipes.reproduce NAME...``; ``--list`` shows them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_dist.elastic import is_launched
from lightning_dist.layout import MESH_AXES, Layout
from recipes import targets
from recipes.config_errors import ConfigError
from recipes.experiments import CONF, Experiment, Reproduction, experiment_files
from recipes.reproduced import Outcome, Run, agreements, outcomes, table
from recipes.sweep.result import JobResult

EVERY = "all"
"""In place of names: each experiment that trains here and whose data is here."""

SECONDS_TO_END = 70
"""That a run has after it was interrupted, before it is killed; see ``launcher.shutdown_timeout``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        the exit status: 0 if all runs lie within their bands and the layouts agree, else 1.

    Raises:
        ValueError: what was asked can't be.
    """
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    if unknown := [word for word in others if word.startswith("-")]:
        parser.error(f"there is no option {unknown[0]}")
    words = [*options.words, *(options.layouts or []), *(options.seeds or []), *others]
    names, layouts, seeds, overrides = _sort(words)
    if options.list or not names:
        _show_list(options.config_dir)
        return 0
    if is_launched():
        raise ValueError("reproduce starts the ranks of its runs itself; run it as one process, without torchrun")
    console = Console()
    experiments = _read(names, layouts, seeds, overrides, options.config_dir, console)
    directory = options.output or Path("outputs", "reproduce", datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    runs = [run for experiment in experiments for run in _runs(experiment, directory)]
    if options.config_dir is not None:
        overrides = ["--config-dir", str(options.config_dir.resolve()), *overrides]
    with _unwound_by_sigterm():
        finished = _run_all(experiments, runs, overrides, directory, console)
    console.print(table(outcomes(experiments, finished)))
    for agreement in agreements(experiments, finished):
        console.print(str(agreement), highlight=False)
    console.print(f"in {directory}/reproduce.json, and the output of each run in run.log of its directory")
    if len(finished) < len(runs):
        return 130
    within = [outcome for outcome in outcomes(experiments, finished) if outcome.verdict == "within"]
    asked = {(run.experiment, run.layout, run.seed) for run in runs}
    return 0 if len(within) == len(asked) and all(a.holds for a in agreements(experiments, finished)) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lightning-dist reproduce", description=__doc__.split("\n\n")[0])
    what = f"experiments, or {EVERY} for each that trains here and whose data is here; and overrides (key=value)"
    parser.add_argument("words", nargs="*", metavar="NAME", help=what + ", as for python -m recipes.train")
    layouts = "in place of those of the experiment, such as dp_shard=2 or 'pp=2 strategy.num_microbatches=1'"
    parser.add_argument("--layouts", nargs="+", action="extend", metavar="LAYOUT", help=layouts)
    parser.add_argument(
        "--seeds", nargs="+", action="extend", metavar="SEED", help="in place of those of the experiment"
    )
    parser.add_argument("--list", action="store_true", help="show the experiments")
    parser.add_argument("--output", type=Path, metavar="DIR", help="directory for the results (default: in outputs)")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a directory of configs of your own")
    return parser


def _sort(words: Sequence[str]) -> tuple[list[str], list[str], list[int], list[str]]:
    """Names, layouts, seeds and overrides, by what they look like: an option takes all words that follow it."""
    names, layouts, seeds, overrides = [], [], [], []
    for word in words:
        if word.isdecimal():
            seeds.append(int(word))
        elif "=" not in word and not word.startswith("~"):
            names.append(word)
        elif word.partition("=")[0] in MESH_AXES:
            layouts.append(word)
        else:
            overrides.append(word)
    return names, layouts, seeds, overrides


def _read(
    names: list[str],
    layouts: list[str],
    seeds: list[int],
    overrides: list[str],
    config_dir: Path | None,
    console: Console,
) -> list[Experiment]:
    """The experiments that are to run, as the command line changes them."""
    asked_all = names == [EVERY]
    found = []
    for name in experiment_files(config_dir) if asked_all else dict.fromkeys(names):
        experiment = Experiment.read(name, overrides, config_dir)
        lacks = _lacks_runs(experiment) or (asked_all and _lacks_data(experiment, layouts, overrides, config_dir))
        if lacks and not asked_all:
            raise ValueError(f"{name} {lacks}")
        if lacks:
            console.print(f"{name} is left out: it {lacks}", highlight=False)
            continue
        assert experiment.reproduction is not None
        found.append(experiment.with_runs(layouts, seeds))
        for layout in found[-1].reproduction.layouts:  # type: ignore[union-attr]
            _num_ranks(layout)
        _refuse_overwritten(found[-1], overrides)
    if not found:
        raise ValueError("no experiment is left to run")
    return found


def _lacks_runs(experiment: Experiment) -> str:
    """Why an experiment is not run; empty if it is."""
    if experiment.band is None or experiment.reproduction is None:
        return "says neither what to expect nor under which layouts; it is there for `lightning-dist explain`"
    return ""


def _lacks_data(experiment: Experiment, layouts: list[str], overrides: list[str], config_dir: Path | None) -> str:
    """Why an experiment has no data here, for the first layout that will run; empty if it has."""
    from recipes import batches, job  # which imports torch and Lightning
    from recipes.train import allowed_targets

    assert experiment.reproduction is not None
    batches.register()
    layout = of_layout((layouts or experiment.reproduction.layouts)[0])
    try:
        cfg = Experiment.read(experiment.name, [*overrides, *layout], config_dir).cfg
        with targets.allow(allowed_targets(overrides)):
            job.build_data(cfg).prepare_data()
    except (ConfigError, ValueError, OSError, ImportError) as error:
        return f"has no data here: {error}"
    return ""


def _runs(experiment: Experiment, directory: Path) -> list[Run]:
    reproduction: Reproduction = experiment.reproduction  # type: ignore[assignment]
    return [
        Run(experiment.name, layout, seed, point, directory)
        for seed in reproduction.seeds
        for layout in reproduction.layouts
        for point in reproduction.points()
    ]


def _refuse_overwritten(experiment: Experiment, overrides: list[str]) -> None:
    """Raises a ValueError for an override of what each run sets itself."""
    over = dict.fromkeys(experiment.reproduction.over, "reproduce.over")  # type: ignore[union-attr]
    instead = {"seed": "--seeds", "experiment": "the experiment's name", "hydra.run.dir": "--output", **over}
    given = {re.split("[=@]", override.lstrip("+~"))[0]: override for override in overrides}
    for run in _runs(experiment, Path()):
        for key in (argument.lstrip("+~").partition("=")[0] for argument in _of_run(run)):
            for other in given:
                if other == key or other.startswith(f"{key}."):
                    raise ValueError(
                        f"{given[other]} is what the runs of {experiment.name} set themselves; pass "
                        f"{instead.get(key, '--layouts')} instead"
                    )


def _run_all(
    experiments: list[Experiment], runs: list[Run], overrides: list[str], directory: Path, console: Console
) -> list[Run]:
    """Each run as a process of its own, one after the other; those that came to an end, if this is interrupted."""
    by_name = {experiment.name: experiment for experiment in experiments}
    finished: list[Run] = []
    directory.mkdir(parents=True, exist_ok=True)
    columns = SpinnerColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(runs))
        for run in runs:
            progress.update(task, description=str(run))
            experiment = by_name[run.experiment]
            try:
                finished.append(run.ended(*_run(run, experiment, overrides)))
            except KeyboardInterrupt:
                console.print("interrupted")
                break
            progress.advance(task)
            outcome = Outcome(experiment, [finished[-1]])
            console.print(outcome.line(), highlight=False)
            _save(directory, experiments, finished)
    return finished


def _run(run: Run, experiment: Experiment, overrides: list[str]) -> tuple[dict[str, float], str | None, float]:
    """The metrics of a run, what went wrong, and the seconds that it took."""
    run.directory.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    paths = filter(None, [os.environ.get("PYTHONPATH")])
    with (run.directory / "run.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "recipes.train", *_arguments(run, experiment, overrides)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(CONF.parent), *paths])},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait()
        except BaseException:
            _end(process)
            raise
    seconds = time.monotonic() - started
    result = JobResult.of(run.directory)
    if process.returncode != 0 or result is None or result.error:
        lines = (run.directory / "run.log").read_text().split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        return {}, (result.error if result and result.error else last), seconds
    return result.metrics, None, seconds


def _arguments(run: Run, experiment: Experiment, overrides: list[str]) -> list[str]:
    arguments = [*overrides, *_of_run(run)]
    if experiment.cfg.trainer.accelerator == "auto" and _has_too_few_accelerators(_num_ranks(run.layout)):
        arguments.append("trainer.accelerator=cpu")
    return arguments


def _of_run(run: Run) -> list[str]:
    return [
        f"experiment={run.experiment}",
        f"seed={run.seed}",
        f"hydra.run.dir='{run.directory.resolve()}'",
        *(f"{key}={value}" for key, value in run.point),
        *of_layout(run.layout),
    ]


def of_layout(text: str) -> list[str]:
    """The overrides of a layout as experiments write it."""
    layout, *others = text.split()
    return [f"trainer.devices={_num_ranks(text)}", f"strategy.layout='{layout}'", *others]


def _num_ranks(layout: str) -> int:
    """Ranks of a layout, which has to say them all."""
    parsed = Layout.parse(layout.split()[0])
    if parsed is None or any(degree < 1 for _, degree in parsed.items()):
        raise ValueError(f"layout {layout!r} takes as many ranks as there are; name each axis with its degree")
    return parsed.world_size


def _has_too_few_accelerators(num_ranks: int) -> bool:
    import torch

    return torch.accelerator.is_available() and torch.accelerator.device_count() < num_ranks


@contextmanager
def _unwound_by_sigterm() -> Iterator[None]:
    """Has the signal end the run in progress, before it ends this process."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(SECONDS_TO_END)
    except BaseException:  # also a second interrupt
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _save(directory: Path, experiments: list[Experiment], finished: list[Run]) -> None:
    found: dict[str, Any] = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "outcomes": [outcome.as_json() for outcome in outcomes(experiments, finished)],
        "agreements": [agreement.as_json() for agreement in agreements(experiments, finished)],
        "runs": [run.as_json() for run in finished],
    }
    unfinished = directory / "reproduce.json.part"
    unfinished.write_text(json.dumps(found, indent=2) + "\n")
    unfinished.replace(directory / "reproduce.json")


def _show_list(config_dir: Path | None) -> None:
    shown = Table(title="Experiments", title_justify="left")
    for column in ("name", "what", "expected", "layouts"):
        shown.add_column(column, overflow="fold")
    for name in experiment_files(config_dir):
        experiment = Experiment.read(name, config_dir=config_dir)
        band, reproduction = experiment.band, experiment.reproduction
        expected = f"{band.metric} {band}" if band else ""
        layouts = "\n".join(reproduction.layouts) if reproduction else "explained only"
        shown.add_row(name, experiment.about, expected, layouts)
    Console().print(shown)


def command() -> None:
    """``python -m recipes.reproduce``: as ``lightning-dist reproduce``."""
    try:
        raise SystemExit(main())
    except (ValueError, OSError) as error:
        print(f"lightning-dist: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    command()
