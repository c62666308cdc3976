"""The files below a folder of data, none of which is left out without a word."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path


def files_below(folder: Path) -> list[Path]:
    """At any depth, in the order of their names; links are followed, each folder is read once.

    Raises:
        PermissionError: a folder in it can't be read.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort(key=partial(_links_last, place))
        found += [path for name in names if (path := Path(place, name)).is_file()]
    return sorted(found)


def _links_last(place: str, name: str) -> tuple[bool, str]:
    return os.path.islink(os.path.join(place, name)), name


def first_repeated(names: Iterable[str]) -> str | None:
    """The first of them that has come before."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _refuse(error: OSError) -> None:
    if isinstance(error, PermissionError):
        raise PermissionError(
            f"{error.filename} can't be listed ({error.strerror}), so what it holds would be missing; make it "
            "readable, or name what is beside it"
        ) from error
    raise error
