"""Numbers that can't be right: not finite, far from those before, or other than the same step gave a moment ago."""

from lightning_dist.numbers.options import BadStep, NumberChecks, OnNonfinite, OnSpike, Spikes

__all__ = ["BadStep", "NumberChecks", "OnNonfinite", "OnSpike", "Spikes"]
