"""``lightning-dist doctor`` on ranks: green where all is well, red with the right sentence where it is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from lightning_dist.cli import main
from lightning_dist.doctor import Fault, Report, Settings, examine, versions
from tests.support.ranks import run_on_ranks
from tests.support.source import ROOT

pytestmark = pytest.mark.sampled


@pytest.fixture(autouse=True, scope="module")
def _imported() -> None:
    """The doctor forks its ranks from the server that the pool has started, which has imported everything."""
    run_on_ranks(1, os.getpid)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Two ranks on the CPU."""
    return Settings(2, "cpu", timeout=60, directory=tmp_path)


def statuses(report: Report) -> dict[str, str]:
    return {result.name: result.status for result in report.results}


def reason(report: Report, name: str) -> str:
    """Why a check is red."""
    (result,) = (result for result in report.results if result.name == name)
    assert result.status == "failed", result.reason
    return result.reason


def test_the_command_is_green_and_writes_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "a-private-value")
    output = tmp_path / "found.json"
    only = ["versions", "devices", "links", "collectives", "parity tp=2"]
    assert main(["doctor", "--devices", "2", "--accelerator", "cpu", "--output", str(output), "--only", *only]) == 0
    found = json.loads(output.read_text())
    assert found["status"] == "ok"
    assert {c["name"]: c["status"] for c in found["checks"]} == {
        "versions": "ok",
        "devices": "ok",
        "links": "skipped",
        "collectives 2 ranks, stride 1": "ok",
        "parity tp=2": "ok",
    }
    assert "NCCL_DEBUG" in found["checks"][0]["details"]["variables that are set"]
    for private in ("a-private-value", str(tmp_path), str(ROOT)):
        assert private not in output.read_text()
    rates = found["checks"][3]["details"]["rates"]
    assert [rate["collective"] for rate in rates] == [
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "all_to_all",
        "broadcast",
        "send/recv",
    ]
    assert all(rate["latency_us"] > 0 and rate["gb_per_s"] > 0 for rate in rates)
    assert "reduce_scatter" in capsys.readouterr().out


def test_a_red_line_is_exit_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = versions.KnownBad("torch", f"=={metadata.version('torch')}", "it is bad today", "https://example.org")
    monkeypatch.setattr(versions, "KNOWN_BAD", [bad])
    output = tmp_path / "found.json"
    assert main(["doctor", "--accelerator", "cpu", "--only", "versions", "--output", str(output)]) == 1
    assert "it is bad today (https://example.org)" in json.loads(output.read_text())["checks"][0]["reason"]


def test_a_terminal_is_shown_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    output = tmp_path / "found.json"
    assert main(["doctor", "--accelerator", "cpu", "--only", "versions", "links", "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "what was found" in shown
    assert "skipped" in shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--only", "nothing"], "no check is called 'nothing'"),
        (["--timeout", "0"], "--timeout is 0"),
        (["--devices", "0"], "--devices is 0"),
        (["--directory", "nowhere"], "make it first"),
    ],
)
def test_what_can_not_be_is_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--accelerator", "cpu", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_ranks_of_others_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert main(["doctor"]) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_a_rank_that_computes_wrongly_is_named_and_no_layout_passes(settings: Settings) -> None:
    names = ["alone", "parity dp_replicate=2", "parity tp=2"]
    report = examine(replace(settings, fault=Fault("wrong weight", rank=1)), only=names)
    assert "rank 1 computes wrongly" in reason(report, "alone")
    for layout in ("dp_replicate=2", "tp=2"):
        told = reason(report, f"parity {layout}")
        assert told.startswith(f"transformer under {layout}: ")
        assert "bound 1e-09" in told


def test_a_group_with_a_short_timeout_is_named(settings: Settings) -> None:
    report = examine(replace(settings, fault=Fault("short timeout")), only=["timeouts"])
    told = reason(report, "timeouts")
    assert "pp [0, 1]" in told
    assert "did not wait 1.5 s for a rank that came late: its timeout is too short" in told


def test_groups_wait(settings: Settings) -> None:
    assert statuses(examine(settings, only=["timeouts"])) == {"timeouts": "ok"}


@pytest.mark.parametrize(
    "form",
    ["single file", *(pytest.param(form, marks=pytest.mark.slow) for form in ("sharded", "sharded in background"))],
)
def test_a_full_disk_is_told(form: str, settings: Settings) -> None:
    report = examine(replace(settings, fault=Fault("full disk", rank=0)), only=[f"checkpoint {form}"])
    assert reason(report, f"checkpoint {form}").startswith("the disk takes no more")
    assert not list(settings.directory.iterdir())


@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="mounting needs root and unshare")
@pytest.mark.slow
def test_a_small_disk_is_told(tmp_path: Path) -> None:
    """A real one: a file system of 40 KiB in memory."""
    program = "import sys; from lightning_dist.cli import main\nif __name__ == '__main__': sys.exit(main(sys.argv[1:]))"
    (script := tmp_path / "doctor.py").write_text(program)
    (disk := tmp_path / "disk").mkdir()
    options = f"--devices 2 --accelerator cpu --only checkpoint --directory {disk} --output {tmp_path}/found.json"
    command = f"mount -t tmpfs -o size=40k tmpfs {disk} && {sys.executable} {script} doctor {options}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    for check in json.loads((tmp_path / "found.json").read_text())["checks"]:
        assert check["reason"].startswith("the disk takes no more"), check["reason"]


def test_silent_ranks_are_named_and_the_next_check_runs(settings: Settings) -> None:
    silent = replace(settings, timeout=3, fault=Fault("silence", rank=1))
    report = examine(silent, only=["collectives", "versions", "timeouts"])
    told = reason(report, "collectives 2 ranks, stride 1")
    assert told.startswith("ranks 0, 1 gave no answer in 3 s: rank 0 is in ")
    assert list(statuses(report)) == ["versions", "collectives 2 ranks, stride 1", "timeouts"]
    assert "gave no answer" in reason(report, "timeouts")


@pytest.mark.slow
def test_checkpoints_go_on_and_a_killed_rank_ends_the_others(settings: Settings) -> None:
    report = examine(settings, only=["checkpoint single file", "checkpoint sharded in background", "kill"])
    assert set(statuses(report).values()) == {"ok"}, [result.reason for result in report.results]
    assert "and in plain Lightning" in report.results[0].reason
    assert "rank 1 of dp_shard=2 was killed" in report.results[-1].reason
    assert not list(settings.directory.iterdir())


@pytest.mark.slow
def test_all_is_green_on_four_ranks(tmp_path: Path) -> None:
    report = examine(Settings(4, "cpu", 120, tmp_path))
    assert report.is_ok, [result.reason for result in report.results if result.status == "failed"]
    assert sum(result.status == "ok" for result in report.results) >= 20
