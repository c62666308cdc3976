"""The command keeps what it has, however it ends."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from recipes.benchmark import __main__ as command
from recipes.benchmark import overview
from recipes.benchmark.results import Record, counted


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _interrupt() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which what a shell runs in the background ignores
    os.kill(os.getpid(), signal.SIGINT)


def _fail() -> None:
    raise RuntimeError("a rank died")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A benchmark of two lines; ``between`` is called after the first."""
    module = ModuleType("recipes.benchmark.two_lines")

    def measure(options: argparse.Namespace, record: Record) -> None:
        record.add(counted("g", "one", options.rounds, 1, 10.0))
        module.between()
        record.add(counted("g", "two", 20, 1, 10.0))

    module.measure, module.between = measure, lambda: None
    module.add_arguments = lambda parser: parser.add_argument("--rounds", type=int, default=9)
    module.QUICK = {"rounds": 3}
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(command, "BENCHMARKS", {"two_lines": "one and two"})
    return module


def saved(folder: Path) -> tuple[list[int], bool]:
    content = json.loads((folder / "two_lines.json").read_text())
    return [line["data"]["ours"] for line in content["lines"]], content["finished"]


@pytest.mark.parametrize(
    ("end", "raised"), [(_terminate, SystemExit), (_interrupt, KeyboardInterrupt), (_fail, RuntimeError)]
)
def test_what_was_measured_is_kept(
    benchmark: ModuleType, tmp_path: Path, end: Callable[[], None], raised: type[BaseException]
) -> None:
    benchmark.between = end
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(raised):
        command.main(["two_lines", "--output", str(tmp_path)])
    assert saved(tmp_path) == ([9], False)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_missed_must_is_the_status(benchmark: ModuleType, tmp_path: Path) -> None:
    assert command.main(["two_lines", "--output", str(tmp_path)]) == 1
    assert saved(tmp_path) == ([9, 20], True)


@pytest.mark.parametrize(("given", "rounds"), [([], 3), (["--rounds", "5"], 5)])
def test_quick_changes_what_is_not_given(benchmark: ModuleType, tmp_path: Path, given: list[str], rounds: int) -> None:
    command.main(["two_lines", "--quick", *given, "--output", str(tmp_path)])
    assert saved(tmp_path)[0][0] == rounds


@pytest.mark.parametrize("name", command.BENCHMARKS)
def test_quick_names_options_of_its_benchmark(name: str) -> None:
    parser = argparse.ArgumentParser()
    command.add_options(parser, name, quick=True)
    required = ["--against", "."] if name == "versions" else []
    options, changed = vars(parser.parse_args([*required, "--quick"])), command.module_of(name).QUICK
    assert changed
    assert options | changed == options
    actions = {action.dest for action in parser._actions}
    assert changed.keys() <= actions


def test_all_of_them_make_one_page_which_says_what_did_not_end(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run(name: str, arguments: list[str]) -> None:
        asked.append(name)
        if name == "data_parallel":
            Record(tmp_path, name, {}).add(counted("bytes", "a | b", 3, 2, 2.0))  # and no more: it was killed
        if name == "pipeline":
            record = Record(tmp_path, name, {})
            record.add(counted("steps", "ours", 1, 2, 1.0))
            record.close(finished=True)

    monkeypatch.setattr(overview, "run", run)
    names = ["--names", "data_parallel", "pipeline", "checkpoint", "--output", str(tmp_path)]
    assert command.main(["all", *names]) == 1
    rows = (tmp_path / "all.md").read_text().splitlines()
    assert "| a \\| b | 3 | 2 | 1.500 | at most 2 | reached |" in rows
    assert "| ours | 1 | 2 | 0.500 | at most 1 | reached |" in rows
    after = {name: rows[rows.index(f"## {name}") + 2] for name in ("data_parallel", "pipeline", "checkpoint")}
    assert after == {
        "data_parallel": "It did not come to its end.",
        "pipeline": "**steps**",
        "checkpoint": "Not measured.",
    }
    assert command.main(["all", *names, "--missing"]) == 1
    assert asked == ["data_parallel", "pipeline", "checkpoint", "data_parallel", "checkpoint"]
    assert command.main(["all", *names[:1], "pipeline", *names[-2:], "--missing"]) == 0


@pytest.mark.slow
def test_each_of_all_is_a_process_of_its_own(tmp_path: Path) -> None:
    assert overview.run("pipeline", ["--output", str(tmp_path), "--rounds", "none"]) == 2
    assert set(overview.NAMES) == command.BENCHMARKS.keys() - {"versions"}
