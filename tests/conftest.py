"""What every test shares: one thread, one pool of ranks, no hub."""

import os
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from tests.support.ranks import POOL

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _close_ranks() -> Iterator[None]:
    yield
    POOL.close()
