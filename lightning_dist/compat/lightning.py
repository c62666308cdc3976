"""Private names of Lightning."""

from __future__ import annotations
