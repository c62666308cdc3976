"""Who imports whom."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent

# ---------------------------------------------------------------- tests


def test_no_module_of_the_tests_imports_from_a_test_module() -> None:
    """What several test files use lies in ``support`` or in a module of their folder; programs in strings included."""
    imports = re.compile(r"^\s*(?:from|import) (\S*\btest_\w+)", re.MULTILINE)
    found = {
        str(path.relative_to(TESTS)): names
        for path in TESTS.rglob("*.py")
        if (names := [name for name in imports.findall(path.read_text()) if name.startswith(("tests.", "."))])
    }
    assert found == {}
