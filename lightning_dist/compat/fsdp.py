"""Private names of torch's fully_shard."""

from __future__ import annotations
