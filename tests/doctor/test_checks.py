"""What the doctor decides without ranks: layouts, versions, links, what is private, what differs."""

from __future__ import annotations

import errno
import getpass
import socket
from importlib import metadata
from pathlib import Path

import pytest
import torch

from lightning_dist.doctor import settings, versions
from lightning_dist.doctor.devices import links_by_pair
from lightning_dist.doctor.examine import KINDS, checks_of, chosen_checks
from lightning_dist.doctor.failures import RankFailure, failures_told
from lightning_dist.doctor.layouts import layouts, over_any, partitions
from lightning_dist.doctor.parity import compare
from lightning_dist.doctor.report import Report
from lightning_dist.doctor.results import CheckResult
from lightning_dist.doctor.scrub import scrub
from lightning_dist.doctor.settings import Settings, choose_ranks
from lightning_dist.doctor.training import Record
from lightning_dist.layout import Layout

TOPOLOGY = """
\x1b[4m\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV12\tSYS\tPXB\t0-15\t0\t\tN/A
GPU1\tNV12\t X \tPHB\tSYS\t0-15\t0\t\tN/A
GPU2\tSYS\tPHB\t X \tSYS\t16-31\t1\t\tN/A
NIC0\tPXB\tSYS\tSYS\t X \t\t\t\t

Legend:

  X    = Self
"""


@pytest.mark.parametrize(("num_ranks", "count"), [(1, 0), (2, 4), (3, 4), (4, 10), (6, 10), (8, 14), (16, 15)])
def test_every_axis_and_every_product_that_fits_is_checked(num_ranks: int, count: int) -> None:
    found = layouts(num_ranks)
    assert len(found) == count == len(set(found))
    assert all(Layout.parse(text).resolve(num_ranks).world_size == num_ranks for text in found)  # type: ignore[union-attr]


def test_groups_with_the_same_ranks_are_measured_once() -> None:
    found = partitions(4)
    assert set(found) == {((0, 1, 2, 3),), ((0, 1), (2, 3)), ((0, 2), (1, 3))}
    assert "tp of tp=4" in found[(0, 1, 2, 3),]
    assert "tp of pp=2,tp=2" in found[(0, 1), (2, 3)]
    assert "pp of pp=2,tp=2" in found[(0, 2), (1, 3)]


def test_a_layout_that_does_not_fit_is_replaced_by_the_next() -> None:
    assert over_any([["dp_shard", "tp"], ["dp_shard"]], 4) == "dp_shard=2,tp=2"
    assert over_any([["dp_shard", "tp"], ["dp_shard"]], 3) == "dp_shard=3"
    assert over_any([["dp_shard", "tp"], ["dp_shard"]], 1) == "dp_shard=1"


def test_links_are_read_from_the_topology() -> None:
    found = links_by_pair(TOPOLOGY)
    assert found["GPU0-GPU1"] == "NV12"
    assert found["GPU0-GPU2"] == "SYS"
    assert found["GPU1-GPU2"] == "PHB"
    assert found["GPU0-NIC0"] == "PXB"
    assert links_by_pair("") == {}


# ---------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("installed", "told"),
    [
        ({"lightning": "2.6.3"}, "published by attackers"),
        ({"pytorch-lightning": "2.6.2"}, "replace all credentials"),
        ({"NCCL": "2.29.2"}, "take 2.29.3"),
        ({"NCCL": "2.21.5"}, "may hang"),
    ],
)
def test_releases_that_are_known_to_be_bad_are_told_with_their_source(installed: dict[str, str], told: str) -> None:
    (sentence,) = versions.known_bad(installed)
    assert told in sentence
    assert "https://" in sentence


def test_good_releases_are_not_told() -> None:
    assert not list(versions.known_bad({"lightning": "2.6.6", "pytorch-lightning": "2.6.1", "NCCL": "2.30.7"}))


@pytest.mark.parametrize(
    ("cuda", "driver", "is_old"),
    [("13.0", "570.133.20", True), ("13.0", "580.65.06", False), ("12.8", "535.1", False), ("12.8", "470.1", True)],
)
def test_a_driver_that_is_too_old_for_cuda_is_told(cuda: str, driver: str, is_old: bool) -> None:
    assert bool(list(versions.old_driver({"CUDA": cuda, "driver": driver}))) is is_old
    assert not list(versions.old_driver({"CUDA": cuda}))


def test_bounds_are_those_of_the_installed_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not list(versions.out_of_bounds())
    monkeypatch.setattr(versions, "BOUNDED", ["some-package"])
    declared = ["torch>=99", "nowhere-to-be-found>=1", 'rich<1; extra == "old"', "packaging"]
    monkeypatch.setattr(metadata, "requires", lambda name: declared)
    torch_too_old, missing = versions.out_of_bounds()
    assert torch_too_old == f"torch {metadata.version('torch')} is installed; some-package needs >=99"
    assert missing.startswith("nowhere-to-be-found is missing")


# ---------------------------------------------------------------- options


def test_numbers_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "num_cores", lambda: 2)
    assert choose_ranks(None, "cpu") == (4, "cpu")
    assert choose_ranks(3, "cpu") == (3, "cpu")
    monkeypatch.setattr(settings, "usable_accelerators", lambda: ("cuda", 8))
    assert choose_ranks(None, "auto") == (8, "cuda")
    assert choose_ranks(2, "auto") == (2, "cuda")
    assert choose_ranks(16, "cpu") == (16, "cpu")
    with pytest.raises(ValueError, match="there are 8 of cuda"):
        choose_ranks(16, "auto")
    with pytest.raises(ValueError, match="at least one rank"):
        choose_ranks(0, "auto")


def test_checks_are_chosen_by_kind_or_name(tmp_path: Path) -> None:
    of_four = Settings(4, "cpu", 10, tmp_path)
    assert {check.kind for check in checks_of(of_four)} == set(KINDS)
    names = [check.name for check in chosen_checks(of_four, ["parity", "kill"], ["parity tp=4"])]
    assert len(names) == 10
    assert "parity tp=4" not in names
    assert names[-1] == "kill"
    with pytest.raises(ValueError, match="no check is called 'pairity'; kinds of checks are versions, devices"):
        chosen_checks(of_four, ["pairity"])


def test_one_rank_has_a_line_for_what_it_can_not_show(tmp_path: Path) -> None:
    assert {check.kind for check in checks_of(Settings(1, "cpu", 10, tmp_path))} == set(KINDS)


# ---------------------------------------------------------------- what is told


def test_private_things_are_taken_out() -> None:
    text = scrub(
        f"File {Path.home()}/secret/train.py, /data/of me/x.ckpt; 192.168.0.7:29500 [::1]:55 on {socket.gethostname()}"
    )
    for private in (str(Path.home()), "secret", "192.168", "29500", "::1", socket.gethostname()):
        assert private not in text
    assert "train.py" in text
    assert scrub({"a": ["/home/someone/file.py", 1.5]}) == {"a": ["file.py", 1.5]}
    assert scrub("https://github.com/pytorch/pytorch/pull/174338") == "https://github.com/pytorch/pytorch/pull/174338"
    assert scrub("0.3 GB/s, send/recv") == "0.3 GB/s, send/recv"
    if (user := getpass.getuser()) != "root":
        assert user not in scrub(f"user {user}")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk takes no more"),
        (RuntimeError("Timed out waiting 500ms for recv operation to complete"), "timeout is too short"),
        (KeyError("x"), "rank 1 raised KeyError"),
    ],
)
def test_a_failure_is_one_sentence(error: Exception, told: str) -> None:
    lost = RankFailure.of(0, RuntimeError("Connection closed by peer"))
    failed = failures_told([lost, RankFailure.of(1, error)], silent=[2])
    assert told in failed.reason
    assert failed.reason.endswith("; ranks [2] did not end by themselves")


def test_a_cause_is_found_behind_another_exception() -> None:
    error = RuntimeError("could not save")
    error.__cause__ = OSError(errno.ENOSPC, "")
    assert "the disk takes no more" in RankFailure.of(0, error).reason


def _record(data_rank: int = 0, loss: float = 1.0, norm: float = 1.0, weight: float = 1.0) -> Record:
    return Record(data_rank, {1: loss}, {1: {(0, ()): norm**2}}, {"w": torch.tensor([weight], dtype=torch.float64)})


@pytest.mark.parametrize(
    ("records", "kind"),
    [
        ([_record(0, loss=0.5), _record(1, loss=1.6)], "loss"),
        ([_record(0), _record(0, loss=1.1)], "loss, between ranks of the same samples"),
        ([_record(0), _record(1, norm=1.1)], "gradient norm"),
        ([_record(0), _record(1, weight=float("nan"))], "final weights"),
    ],
)
def test_the_largest_difference_is_found(records: list[Record], kind: str) -> None:
    assert compare(records, _record())[0].kind == kind
    assert compare(records, _record())[0].relative > 0.04


def test_equal_trainings_differ_by_nothing() -> None:
    assert all(d.relative == 0 for d in compare([_record(0, loss=0.5), _record(1, loss=1.5)], _record()))


def test_a_report_that_was_cut_short_is_not_ok() -> None:
    ok, red = CheckResult("versions", "ok", ""), CheckResult("kill", "failed", "")
    assert Report(2, "cpu", 1, [ok]).status == "ok"
    assert Report(2, "cpu", 2, [ok]).status == "unfinished"
    assert Report(2, "cpu", 3, [ok, red]).status == "failed"
