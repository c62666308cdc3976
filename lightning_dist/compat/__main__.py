"""Which private names of other projects the installed releases lack: ``python -m lightning_dist.compat``."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_dist.compat import names

FOLDER = Path(__file__).parent
REGISTERING = ("uses", "hands_on", "name_of")
OTHERS = [FOLDER / name for name in ("__init__.py", "__main__.py", "names.py")]
"""Files of ``compat`` that touch no other project."""


def find_gone() -> list[names.PrivateName]:
    """The registered names that the installed releases lack, also of a file that no longer imports for that."""
    gone = []
    for file in sorted(set(FOLDER.rglob("*.py")) - set(OTHERS)):
        path = ".".join(file.relative_to(FOLDER).with_suffix("").parts).removesuffix(".__init__")
        try:
            importlib.import_module(f"lightning_dist.compat.{path}")
        except (ImportError, AttributeError) as error:
            lost = [name for name in registered_in(file) if not name.is_there()]
            what = f"{type(error).__name__}: {error}"
            gone += lost or [names.PrivateName(_project(path), what, f"compat/{file.name}")]
    return list(dict.fromkeys(gone + [name for name in names.REGISTER if not name.is_there()]))


def _project(path: str) -> str:
    first = path.partition(".")[0]
    return first if first in names.SEEN_IN else {"fabric": "lightning"}.get(first, "torch")


def registered_in(file: Path) -> Iterator[names.PrivateName]:
    """What a file registers by :func:`~lightning_dist.compat.names.uses` and ``hands_on``, without importing it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in REGISTERING:
            texts = [str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)]
            purpose = texts.pop() if node.func.id != "uses" else ""
            yield from (names.PrivateName(path, purpose, f"compat/{file.name}") for path in texts)


def table(gone: Iterable[names.PrivateName]) -> Table:
    """The names that are gone: the version each was seen in, the one that is installed, and what used it."""
    shown = Table(title="Private names that are gone", title_justify="left")
    for column in ("name", "seen in", "installed", "used by", "for"):
        shown.add_column(column, overflow="fold")
    for name in gone:
        shown.add_row(name.path, name.seen_in, _installed(name.path.partition(".")[0]), name.user, name.purpose)
    return shown


def main() -> int:
    """Prints the table, and returns 1 where names are gone."""
    gone = find_gone()
    Console().print(table(gone) if gone else f"all {len(names.REGISTER)} private names are there")
    return int(bool(gone))


def _installed(project: str) -> str:
    try:
        return metadata.version(project)
    except metadata.PackageNotFoundError:
        return "no"


if __name__ == "__main__":
    sys.exit(main())
