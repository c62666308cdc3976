"""Who imports whom, what is private to others, and how large things are."""

from __future__ import annotations

import graphlib
import re
import statistics

import pytest

from tests.support import source

# ---------------------------------------------------------------- the package


def test_no_module_imports_what_imports_it() -> None:
    """Imports within functions and under ``TYPE_CHECKING`` included."""
    try:
        graphlib.TopologicalSorter(source.import_graph()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_private_names_of_other_projects_are_in_compat() -> None:
    found = list(source.private_names())
    assert not found, "\n".join(found)


def test_private_names_that_classes_override_are_in_compat() -> None:
    found = list(source.overridden_private_names())
    assert not found, "\n".join(found)


def test_compat_imports_nothing_else_of_the_package() -> None:
    for name, used in source.import_graph().items():
        if name.startswith("lightning_dist.compat"):
            assert all(other.startswith("lightning_dist.compat") for other in used), (name, used)


def test_files_and_functions_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in source.PACKAGE.rglob("*.py")}
    assert statistics.median(lengths.values()) <= 150
    too_long = {path.name: length for path, length in lengths.items() if length > 450}
    assert not too_long
    functions = source.function_lengths()
    assert functions[int(0.95 * len(functions))] <= 30


# ---------------------------------------------------------------- the tests


def test_no_module_of_the_tests_imports_from_a_test_module() -> None:
    """What several test files use lies in ``support`` or in a module of their folder; programs in strings included."""
    imports = re.compile(r"""^[\s"']*(?:from|import) (tests\.(?:\w+\.)*test_\w+)""", re.MULTILINE)
    paths = (source.ROOT / "tests").rglob("*.py")
    found = {path.name: names for path in paths if (names := imports.findall(path.read_text()))}
    assert not found
