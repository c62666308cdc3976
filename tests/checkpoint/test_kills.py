"""A rank that is killed while it saves leaves every complete checkpoint whole."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("count", [1, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_lose_no_checkpoint(count: int) -> None:
    command = [sys.executable, "-m", "tests.checkpoint.kills", str(count)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60 + 20 * count, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert f"{count} kills over" in ended.stdout
