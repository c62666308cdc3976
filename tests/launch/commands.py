"""``python -m recipes.train`` of the probe, as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROBE_CONF = ["--config-dir", str(Path(__file__).parent / "conf")]


def command(*arguments: str, directory: Path | None = None) -> list[str]:
    places = [f"hydra.run.dir={directory}", f"hydra.sweep.dir={directory}"] if directory else []
    own = ["experiment=probe", "targets=[tests.launch.probe]"]
    return [sys.executable, "-m", "recipes.train", *PROBE_CONF, *arguments, *own, *places]


def run(arguments: list[str], seconds: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD", "TORCHE"))}
    clean |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
    return subprocess.run(arguments, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=seconds)
