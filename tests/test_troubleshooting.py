"""The guide of messages: each that it quotes is one that is raised, by this package or by those below it."""

from __future__ import annotations

import ast
import mmap
import multiprocessing.spawn
import pickle
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.trainer.connectors import accelerator_connector

from lightning_dist import HybridFabricStrategy, HybridStrategy, Layout
from lightning_dist.doctor import devices
from lightning_dist.doctor.results import CheckFailed
from tests.support.parity import QUIET
from tests.support.source import PACKAGE, trees

TEXT = (PACKAGE / "guides" / "troubleshooting.md").read_text()
LIBRARIES = Path(torch.__file__).parent / "lib"
OF_OTHERS = {
    "You selected an invalid strategy name": Path(accelerator_connector.__file__),
    "An attempt has been made to start a new process before": Path(multiprocessing.spawn.__file__),
    "The server socket has failed to listen on any local network address": LIBRARIES / "libtorch_cpu.so",
    "The client socket has timed out after ...": LIBRARIES / "libtorch_cpu.so",
    "Gloo connectFullMesh failed with ...": LIBRARIES / "libtorch_cpu.so",
    "Connection closed by peer": LIBRARIES / "libtorch_cpu.so",
    "Expected to have finished reduction in the prior iteration": LIBRARIES / "libtorch_cpu.so",
    "It is possible that dataloader's workers are out of shared memory": LIBRARIES / "libtorch_python.so",
    "NCCL error in: ...": LIBRARIES / "libtorch_cuda.so",
    "Watchdog caught collective operation timeout": LIBRARIES / "libtorch_cuda.so",
    "CUDA out of memory": LIBRARIES / "libc10_cuda.so",
}
"""Where the words of torch, Lightning and Python are. Those of CUDA are looked for where torch has it."""
RAISED_HERE = {"Can't pickle local object ...", "EADDRINUSE", "address already in use"}
"""Words that are put together when they are raised, as a test below does."""
GAP = "\0"


def quoted() -> list[str]:
    """The messages that open the bullets, and others that stand before the first colon or full stop after one."""
    statements = re.findall(r"^- (.*?)(?=^- |^#|^$|\Z)", TEXT, flags=re.DOTALL | re.MULTILINE)
    openings = (re.match(r"`[^`]+`(?:(?:, | \(|, and torch's )`[^`]+`\)?)*", statement) for statement in statements)
    found = [" ".join(text.split()) for opening in openings if opening for text in re.findall(r"`([^`]+)`", opening[0])]
    return list(dict.fromkeys(found))


@cache
def own_strings() -> list[str]:
    """Strings of the package as they are raised, with a gap for what is put in."""
    return [text for tree in trees().values() for node in ast.walk(tree) if (text := _string(node))]


def _string(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else GAP for v in node.values)
    return ""


def _is_in(message: str, text: str) -> bool:
    """Whether a text has the words of a message, one part after the other."""
    place = 0
    for part in re.split(r"\s*\.\.\.\s*", message):
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def _is_in_file(message: str, path: Path) -> bool:
    words = message.removesuffix("...").rstrip().encode()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(words) >= 0


def test_each_message_exists() -> None:
    messages = quoted()
    assert len(messages) > 55
    assert OF_OTHERS.keys() <= set(messages)
    for message in messages:
        assert len(re.sub(r"\W", "", message)) >= 8, f"{message!r} would be found anywhere"
        if message in OF_OTHERS:
            path = OF_OTHERS[message]
            is_of_cuda = "cuda" in path.name and not path.exists()
            assert is_of_cuda or _is_in_file(message, path), message
        elif message not in RAISED_HERE:
            assert any(_is_in(message, text) for text in own_strings()), message


def test_a_message_that_nothing_raises_would_be_noticed() -> None:
    assert not any(_is_in("layout ... needs ... processes", text) for text in own_strings())
    assert not _is_in_file(
        "You selected an invalid strategy of yours", OF_OTHERS["You selected an invalid strategy name"]
    )


# ---------------------------------------------------------------- raised here


def _trainer(**given: Any) -> pl.Trainer:
    return pl.Trainer(**{**QUIET, "accelerator": "cpu", "devices": 1, **given})


def _without_gpus_batch_norm() -> None:
    trainer = _trainer(strategy=HybridStrategy("dp_replicate=1"), sync_batchnorm=True)
    trainer.fit(BoringModel())


CHEAP: dict[str, Callable[[], Any]] = {
    "layout ... needs ... ranks, but there ...; layouts that fit:": lambda: Layout(dp_shard=3).resolve(2),
    "layout has no axis ...": lambda: HybridStrategy("dp_shrad=2"),
    "...; this version trains over ... only": lambda: _trainer(strategy=HybridStrategy("ep=1,cp=2"), devices=2),
    "Trainer(sync_batchnorm=True) needs a GPU": _without_gpus_batch_norm,
    "under Fabric: a pipeline has to run the whole training step itself": lambda: HybridFabricStrategy("pp=2"),
}


@pytest.mark.parametrize("message", CHEAP)
def test_each_of_these_is_raised(message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011, any is looked at
        CHEAP[message]()
    assert _is_in(message, str(error.value))
    assert str(error.value).count("\n") == 0


def test_what_lies_in_a_function_can_not_be_pickled() -> None:
    class Inside:
        pass

    with pytest.raises(AttributeError, match=r"Can't pickle local object '.*Inside'"):
        pickle.dumps(Inside())


def test_a_port_that_is_taken_is_told_as_that() -> None:
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    with pytest.raises(
        dist.DistNetworkError, match=r"has failed to listen on any local network address.*EADDRINUSE.*addr"
    ):
        dist.TCPStore("127.0.0.1", store.port, 1, is_master=True)


def test_little_shared_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: Any = SimpleNamespace(device_type="cuda", num_ranks=2)
    monkeypatch.setattr(devices, "run_ranks", lambda *_: [{"name": "a device", "free_gib": 1}])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=64 * 2**20, used=0, free=0))
    with pytest.raises(
        CheckFailed, match="/dev/shm has 64 MiB, over which processes talk to each other; start the con"
    ):
        devices.check_devices(settings)
