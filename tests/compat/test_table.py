"""``python -m lightning_dist.compat`` says in one table which private names are gone."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from lightning_dist.compat import __main__ as command
from lightning_dist.compat import names

GONE = names.PrivateName("torch.nn.Module._no_such_name", "shows what is there", "nobody")
THERE = names.PrivateName("torch.nn.Module._parameters", "", "somebody")


def test_a_name_that_is_gone_is_a_row_and_an_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(names, "REGISTER", [THERE, GONE])
    monkeypatch.setenv("COLUMNS", "200")
    assert command.main() == 1
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "nn.Module" in line]
    cells = [cell.strip() for cell in row.strip("│ ").split("│")]
    assert cells == [GONE.path, names.SEEN_IN["torch"], metadata.version("torch"), GONE.user, GONE.purpose]


def test_a_file_that_does_not_import_tells_all_that_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "torch.py"
    file.write_text(
        "from torch.nn import _lost\n"
        f"hands_on({{'torch.nn._lost': 'is used'}})\n@uses('{THERE.path}', '{GONE.path}')\ndef f(): ...\n"
    )
    monkeypatch.setattr(names, "REGISTER", [])
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    monkeypatch.setattr(command.importlib, "import_module", _fails(command.importlib.import_module))
    assert [(name.path, name.user) for name in command.find_gone()] == [
        ("torch.nn._lost", "compat/torch.py"),
        (GONE.path, "compat/torch.py"),
    ]
    file.write_text("from torch.nn import _lost\n")
    (name,) = command.find_gone()
    assert name.purpose == "ImportError: cannot import name '_lost'"


def _fails(import_module):
    def load(name: str):
        if name == "lightning_dist.compat.torch":
            raise ImportError("cannot import name '_lost'")
        return import_module(name)

    return load


def test_nothing_is_gone_of_the_installed_releases(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main() == 0
    assert "private names are there" in capsys.readouterr().out
