"""The guides claim what tests show: each statement names a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support.source import PACKAGE, ROOT
from tests.user_code.cases import CASES

GUIDES = sorted((PACKAGE / "guides").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *sorted(PACKAGE.rglob("*.md"))]
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
CASES_OF_A_TEST = re.compile(r"test_user_code\.py::\w+`\s+\(([^)]*)\)")


@pytest.mark.parametrize("guide", [g for g in GUIDES if g.name != "README.md"], ids=lambda guide: guide.stem)
def test_every_statement_names_a_test(guide: Path) -> None:
    text = re.sub(r"```.*?```", "", guide.read_text(), flags=re.DOTALL)
    statements = re.findall(r"^- .*?(?=^- |^#|^$|\Z)", text, flags=re.DOTALL | re.MULTILINE)
    assert statements
    for statement in statements:
        assert TEST.search(statement) or "No test:" in statement, statement


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.parent.name + "/" + path.name)
def test_what_a_document_names_is_there(document: Path) -> None:
    text = document.read_text()
    for file, name in TEST.findall(text):
        path = ROOT / file
        assert path.is_file(), file
        functions = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{file}::{name}"
    for cases in CASES_OF_A_TEST.findall(text):
        assert set(re.findall(r"\w+", cases)) <= CASES.keys(), cases
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (document.parent / link).exists(), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.parent.name + "/" + path.name)
def test_paths_of_the_source_that_a_document_names_are_there(document: Path) -> None:
    for path in re.findall(r"`((?:lightning_dist|recipes|tests|conf|\.ci|\.github)/[\w./]*)`", document.read_text()):
        assert (ROOT / path).exists(), path


def test_the_index_of_the_guides_names_all() -> None:
    index = (PACKAGE / "guides" / "README.md").read_text()
    assert [g.name for g in GUIDES if f"]({g.name})" not in index and g.name != "README.md"] == []
