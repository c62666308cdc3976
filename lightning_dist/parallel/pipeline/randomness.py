"""Random numbers of a pipeline: alike on all stages up to their entry, then each stage's own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_microbatch(seed: int, index: int, stage: int | None = None) -> None:
    """Seeds torch, Python and numpy: up to a stage's entry the same on all stages, then the stage's own."""
    number = (seed * 1_000_003 + index * 1_009 + (0 if not stage else stage * 7_919 + 1)) % 2**31
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


@contextmanager
def kept_random_states(device: torch.device) -> Iterator[None]:
    """Leaves the generators of torch, Python and numpy as they were."""
    state, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python)
        np.random.set_state(numpy)
        if on_device is not None:
            torch.get_device_module(device).set_rng_state(on_device)
