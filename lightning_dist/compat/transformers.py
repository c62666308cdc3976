"""Private names of transformers and other model libraries."""

from __future__ import annotations
