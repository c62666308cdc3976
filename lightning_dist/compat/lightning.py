"""Private names of Lightning."""

from __future__ import annotations

from lightning_dist.compat.names import hands_on

# --- parallel ---

LIGHTNING_REGISTRIES = ("_trainer", "_hparams", "_hparams_initial")
"""Attributes under which a LightningModule keeps what Lightning gave it."""
for _name in LIGHTNING_REGISTRIES:
    hands_on(f"lightning.pytorch.LightningModule.{_name}", "what belongs to Lightning among a module's attributes")
