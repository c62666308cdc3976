"""Checkpoints of each form: saved under one layout, loaded under another, trained on to the numbers of one process."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lightning_dist.doctor.layouts import over_any
from lightning_dist.doctor.parity import BOUND, References, assert_resumed
from lightning_dist.doctor.ranks import run_ranks
from lightning_dist.doctor.results import CheckFailed, Finding
from lightning_dist.doctor.settings import Settings
from lightning_dist.doctor.training import Job, Saving, train

NETWORK = "transformer"
SAVED_AFTER = 2
"""Steps."""


@dataclass(frozen=True)
class Form:
    """One form of checkpoint, and under what it is saved and loaded.

    Args:
        name: for users.
        format: of the strategy's ``checkpoint_format``.
        in_background: as the strategy's ``async_save``.
        saved: axes, by preference.
        loaded: axes, by preference.
        in_lightning: also loaded by plain Lightning in one process.
    """

    name: str
    format: Literal["single", "sharded"]
    in_background: bool
    saved: list[list[str]]
    loaded: list[list[str]]
    in_lightning: bool = False


FORMS = [
    Form("single file", "single", False, [["dp_shard", "tp"], ["dp_shard"]], [["pp", "dp_replicate"], ["pp"]], True),
    Form("sharded", "sharded", False, [["pp", "dp_shard"], ["pp"]], [["dp_replicate", "tp"], ["tp"]]),
    Form("single file in background", "single", True, [["tp"]], [["dp_shard"]], True),
    Form("sharded in background", "sharded", True, [["dp_shard"]], [["pp", "tp"], ["tp"]]),
]


def check_form(settings: Settings, references: References, form: Form) -> Finding:
    """Trains, saves in the middle, goes on elsewhere."""
    saved, loaded = over_any(form.saved, settings.num_ranks), over_any(form.loaded, settings.num_ranks)
    one = references.of(NETWORK)
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=settings.directory) as folder:
        saving = Saving(Path(folder), form.format, form.in_background, SAVED_AFTER)
        job = Job(NETWORK, settings, saved, settings.device_type, stop_after=SAVED_AFTER, saving=saving)
        run_ranks(settings, train, job)
        path = saving.path(SAVED_AFTER)
        _assert_form(form, path)
        on = Job(NETWORK, settings, loaded, settings.device_type, resume=path)
        what = f"saved under {saved} and loaded under"
        worst = assert_resumed(f"{what} {loaded}", run_ranks(settings, train, on), one)
        if form.in_lightning:
            alone = Job(NETWORK, replace(settings, fault=None), None, "cpu", resume=path)
            records = run_ranks(settings, train, alone, num_ranks=1, together=False)
            worst = max(worst, assert_resumed(f"{what} plain Lightning", records, one))
    where = f"{loaded}{' and in plain Lightning' if form.in_lightning else ''}"
    return Finding(f"saved under {saved}, goes on under {where}; relative difference {worst:.1e}, bound {BOUND:g}")


def _assert_form(form: Form, path: Path) -> None:
    if not path.exists():
        raise CheckFailed(f"the save ended without an error, and there is no {path.name}")
    if path.is_dir() != (form.format == "sharded"):
        raise CheckFailed(f"a {form.name} checkpoint is a {'directory' if path.is_dir() else 'file'}")
