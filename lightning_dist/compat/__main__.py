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


def find_gone() -> list[names.PrivateName]:
    """The registered names that the installed releases lack, also of a file that no longer imports for that."""
    gone = []
    for file in sorted(FOLDER.glob("[!_]*.py")):
        try:
            importlib.import_module(f"lightning_dist.compat.{file.stem}")
        except (ImportError, AttributeError) as error:
            lost = [name for name in registered_in(file) if not name.is_there()]
            project = {"fabric": "lightning"}.get(file.stem, file.stem if file.stem in names.SEEN_IN else "torch")
            gone += lost or [names.PrivateName(project, f"{type(error).__name__}: {error}", f"compat/{file.name}")]
    return list(dict.fromkeys(gone + [name for name in names.REGISTER if not name.is_there()]))


def registered_in(file: Path) -> Iterator[names.PrivateName]:
    """What a file registers by the functions of ``names``, without importing it; but for what it does in loops."""
    known: dict[str, str] = {}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            known[node.targets[0].id] = _text(node.value, known)
        elif isinstance(node, ast.Call):
            for path, purpose in _registered_by(node, known):
                if "." in path and path.partition(".")[0] in names.SEEN_IN:
                    yield names.PrivateName(path, purpose, f"compat/{file.name}")


def _registered_by(call: ast.Call, known: dict[str, str]) -> list[tuple[str, str]]:
    if call.args and isinstance(table := call.args[0], ast.Dict):
        items = zip(table.keys, table.values, strict=True)
        return [(_text(path, known), _text(purpose, known)) for path, purpose in items]
    texts = [_text(argument, known) for argument in call.args]
    if isinstance(call.func, ast.Name) and call.func.id == "uses":
        return [(text, "") for text in texts]
    return [(texts[0], texts[1])] if len(texts) > 1 else []


def _text(node: ast.AST | None, known: dict[str, str]) -> str:
    """A string that is written out, also of parts that have names."""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, known) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, known)
    return known.get(node.id, "") if isinstance(node, ast.Name) else str(getattr(node, "value", ""))


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
