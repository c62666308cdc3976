"""Private names of torchmetrics."""

from __future__ import annotations
