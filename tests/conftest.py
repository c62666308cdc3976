"""What every test shares: one thread, one pool of ranks, no hub."""

import os
import zlib
from collections import defaultdict
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

# xdist's controller imports classes of warnings in a thread for each worker: two of them broke each other's imports
import lightning.pytorch  # noqa: F401
import pytest
import torch

from tests.support import device
from tests.support.ranks import POOL

torch.set_num_threads(1)

TIMED = (
    "tests/elastic/",
    "tests/preemption/",
    "tests/doctor/",
    "tests/launch/",
    "tests/sweeps/",
    "tests/checkpoint/test_kills.py",
    "tests/test_caught_exceptions.py",
    "tests/test_scripts.py",
)
"""Tests that wait, by a clock, for what other processes do: on a busy machine one may come too late for another. Each
has a second try, and the summary at the end tells which took it (RERUN). No test of numbers is among them.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="of the tests' ranks and Trainers")
    parser.addoption("--share-devices", action="store_true", help="ranks take the GPUs that there are, several to one")


def pytest_configure(config: pytest.Config) -> None:
    device.choose(config.getoption("--device"), config.getoption("--share-devices"))
    if device.device_type() != "cpu" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda, and torch sees no CUDA device here; leave the option out")


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of each table of a file that says ``sampled`` the gate takes one case in five, the same each time; the others
    are slow. Which ones has no pattern, so that each axis and each feature of a table with both is among them.
    Those of ``TIMED`` have a second try.
    """
    for item in items:
        if item.nodeid.startswith(TIMED):
            item.add_marker(pytest.mark.flaky(reruns=1))
    tables: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled") and not item.get_closest_marker("slow"):
            tables[item.nodeid.partition("[")[0]].append(item)
    for cases in tables.values():
        cases.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        for item in cases[-(-len(cases) // 5) :]:
            item.add_marker(pytest.mark.slow)


def pytest_report_header() -> str:
    return f"device: {device.device_type()}"


@pytest.fixture(autouse=True, scope="session")
def _close_ranks() -> Iterator[None]:
    yield
    POOL.close()


@pytest.fixture(scope="session")
def store() -> Iterator[str]:
    """The address of an object store that speaks S3's protocol; one, as s3fs keeps the address that it saw first."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()
