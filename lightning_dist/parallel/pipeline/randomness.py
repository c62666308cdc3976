"""Random numbers of a pipeline: alike on all stages up to their entry, then each stage's own."""

from __future__ import annotations

import torch

from lightning_dist.randomness import seed_generators


def seed_microbatch(device: torch.device, seed: int, index: int, stage: int | None = None) -> None:
    """Seeds torch, Python and numpy: up to a stage's entry the same on all stages, then the stage's own."""
    seed_generators((seed * 1_000_003 + index * 1_009 + (0 if not stage else stage * 7_919 + 1)) % 2**31, device)
