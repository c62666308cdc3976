"""What the source says of itself: who imports whom, and which private names of other projects it touches."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lightning_dist.compat.names import is_set_by

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_dist"
NAMED_TUPLE = {"_asdict", "_field_defaults", "_fields", "_make", "_replace"}
"""Public in spite of their underscore."""
OURS = {"_like"}
"""Strings with an underscore that are no name of others: the end of a name, say."""


@cache
def trees(folder: str = "lightning_dist") -> dict[str, ast.Module]:
    """The syntax tree of every module below a folder of the repository, by dotted name."""
    return {_dotted(path): ast.parse(path.read_text()) for path in sorted((ROOT / folder).rglob("*.py"))}


def _dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that a module imports: at its top, in functions and under ``TYPE_CHECKING``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph() -> dict[str, set[str]]:
    """The modules of the package, each with those that it imports."""
    modules = trees()
    graph: dict[str, set[str]] = {}
    for name, tree in modules.items():
        found = (n if n in modules else n.rpartition(".")[0] for n in imported(tree) if n.startswith("lightning_dist"))
        graph[name] = {n for n in found if n in modules}
    return graph


def private_names() -> Iterator[str]:
    """Private names of other projects outside of ``compat``, as ``module:line name``."""
    modules = {name: tree for name, tree in trees().items() if ".compat" not in name}
    own = {name: _defined(tree) for name, tree in modules.items()}
    everywhere = set().union(*own.values())
    for module, tree in modules.items():
        for node in ast.walk(tree):
            for name in _private_names_of(node, own[module], everywhere):
                yield f"{module}:{node.lineno} {name}"  # type: ignore[attr-defined]


def _private_names_of(node: ast.AST, here: set[str], everywhere: set[str]) -> Iterator[str]:
    if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in here:
        holder = node.value.id if isinstance(node.value, ast.Name) else ""
        of_itself = holder in ("self", "cls") and node.attr in everywhere
        if not of_itself and holder not in sys.stdlib_module_names:
            yield node.attr
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
        if is_private(node.value) and node.value not in here | OURS:
            yield repr(node.value)
    elif isinstance(node, ast.Import | ast.ImportFrom):
        names = list(imported(node))
        yield from (name for name in names if any(map(is_private, name.split("."))))


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore and is no part of the public interface of named tuples."""
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in NAMED_TUPLE


def _defined(tree: ast.AST) -> set[str]:
    """Names that a module gives to functions, classes, variables and attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            names.add(node.attr)
    return names


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def overridden_private_names() -> Iterator[str]:
    """Private attributes that our classes override, or reach as ``self.name``, of classes of other projects."""
    own_or_pythons = {"lightning_dist", "builtins", *sys.stdlib_module_names}
    for module, tree in trees().items():
        for node in ast.walk(tree) if ".compat" not in module else ():
            kind = getattr(importlib.import_module(module), node.name, None) if isinstance(node, ast.ClassDef) else None
            for base in inspect.getmro(kind) if inspect.isclass(kind) else ():
                if base.__module__.partition(".")[0] not in own_or_pythons:
                    names = (name for name in sorted(_reached(node)) if name in vars(base) or is_set_by(base, name))
                    yield from (f"{module}.{node.name} {name} of {base.__qualname__}" for name in names)


def _reached(node: ast.AST) -> set[str]:
    """Private names that the body of a class defines or reaches as ``self.name``."""
    reached = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and _is_self(n.value)}
    return {name for name in reached | _defined(node) if is_private(name)}


def function_lengths() -> list[int]:
    """Lines of every function and method of the package, without decorators."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    functions = (node for tree in trees().values() for node in ast.walk(tree) if isinstance(node, kinds))
    return sorted(node.end_lineno - node.lineno + 1 for node in functions)  # type: ignore[operator]
