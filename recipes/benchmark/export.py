"""``python -m recipes.benchmark.export SOURCE TARGET FORM``: converts a checkpoint, and prints as JSON what memory that
took: bytes of the process when it had imported torch, and at its peak."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

FORMS = {"lightning": "file.ckpt", "sharded": "directory.ckpt", "safetensors": "folder"}
"""What is measured, and the name of each target."""


def write_source(path: Path, total: int, largest: int) -> None:
    """A sharded checkpoint of so many bytes, of which one tensor has ``largest`` and the others 20 MB."""
    from lightning_dist import checkpoint

    sizes = [largest, *[20_000_000] * round((total - largest) / 20e6)]
    state = {f"layers.{number}.weight": torch.randn(size // 4) for number, size in enumerate(sizes)}
    checkpoint.save({"state_dict": state}, path, sharded=True)


def memory_of_conversion(source: Path, target: Path, form: str) -> dict[str, float]:
    """Of one in a process of its own: ``idle`` and ``peak`` in bytes, and ``seconds``."""
    command = [sys.executable, "-m", "recipes.benchmark.export", str(source), str(target), form]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured: dict[str, float] = json.loads(answer.splitlines()[-1])
    return measured


def peak_memory() -> int:
    """Most bytes of this process that were in memory at once, shared libraries included."""
    try:
        status = Path("/proc/self/status").read_text()  # getrusage counts what forked this process too
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def main(source: str, target: str, form: str) -> None:
    """The process that is measured."""
    idle = peak_memory()

    from lightning_dist import checkpoint

    begin = time.perf_counter()
    checkpoint.convert(source, target, to=form)  # type: ignore[arg-type]
    print(json.dumps({"idle": idle, "peak": peak_memory(), "seconds": time.perf_counter() - begin}))


if __name__ == "__main__":
    main(*sys.argv[1:])
