"""The checkpoint that a preempted fit leaves, and how the next start of the same script finds it.

Its name is Lightning's, ``hpc_ckpt_<number>.ckpt`` in ``Trainer.default_root_dir``, which Lightning itself goes on from
under SLURM, and for ``ckpt_path="hpc"``. Beside it lies ``hpc_ckpt_<number>.json``, which says whose it is; it is
written when the checkpoint is complete.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from lightning_dist.checkpoint.locations import as_path, remove

_NAME = re.compile(r"hpc_ckpt_(\d+)\.ckpt")


@dataclass(frozen=True)
class Fit:
    """Which fit of which start a checkpoint is of: that of the same script with the same arguments.

    Args:
        script: with its arguments.
        module: the class of the LightningModule.
        number: of the fit in its process.
    """

    script: list[str]
    module: str
    number: int
    _begun: ClassVar[int] = 0

    @classmethod
    def next_of(cls, module: object) -> Fit:
        """The one that begins now."""
        cls._begun += 1
        return cls(list(sys.argv), f"{type(module).__module__}.{type(module).__qualname__}", cls._begun)


def next_path(folder: str) -> str:
    """Where to save the next one."""
    return str(as_path(folder) / f"hpc_ckpt_{max(_numbers(folder), default=0) + 1}.ckpt")


def label(path: str, fit: Fit) -> None:
    """Says whose a complete checkpoint is."""
    _label_of(path).write_text(json.dumps(asdict(fit)))


def newest_of(folder: str, fit: Fit) -> str | None:
    """That of the same fit of an earlier start; None if there is none."""
    for number in sorted(_numbers(folder), reverse=True):
        path = str(as_path(folder) / f"hpc_ckpt_{number}.ckpt")
        if _is_of(path, fit):
            return path
    return None


def is_older(path: str, than: str) -> bool:
    """Whether one was written before another; False where that can't be seen."""
    try:
        times = [as_path(each).stat().st_mtime for each in (path, than)]
    except (OSError, ValueError):
        return False
    return times[0] < times[1]


def remove_label(path: str) -> None:
    """Before the checkpoint is removed."""
    remove(_label_of(path))


def _is_of(path: str, fit: Fit) -> bool:
    file = _label_of(path)
    try:
        return file.is_file() and json.loads(file.read_text()) == asdict(fit)
    except ValueError:
        return False


def _label_of(path: str) -> Any:
    return as_path(path).with_suffix(".json")


def _numbers(folder: str) -> list[int]:
    there: Path = as_path(folder)
    if not there.is_dir():
        return []
    return [int(found[1]) for file in there.iterdir() if (found := _NAME.fullmatch(file.name))]
