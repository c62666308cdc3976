"""Private names of torch beside those of fully_shard."""

from __future__ import annotations
