"""What pyproject.toml declares is what the code imports, and conf what the strategy takes."""

from __future__ import annotations

import inspect
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import hydra.utils
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from lightning_dist import HybridStrategy, Layout
from lightning_dist.compat.names import SEEN_IN
from tests.support.source import ROOT, imported, trees

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"hydra_plugins", "lightning_dist", "recipes", "tests"}
BY_THE_TRAINER = ["accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin"]
"""Arguments of the strategy that are no options of a config."""


def declared(*extras: str) -> dict[str, Requirement]:
    """What is installed with the package and these extras, by name of the distribution."""
    found: dict[str, Requirement] = {}
    for text in [*PROJECT["dependencies"], *(r for extra in extras for r in PROJECT["optional-dependencies"][extra])]:
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) == canonicalize_name(PROJECT["name"]):
            found |= declared(*requirement.extras)
        found[canonicalize_name(requirement.name)] = requirement
    return found


def foreign(folder: str) -> Iterator[tuple[str, str]]:
    """Modules below a folder, each with the top packages of others that it imports."""
    for module, tree in trees(folder).items():
        tops = {name.split(".")[0] for name in imported(tree)}
        yield from ((module, top) for top in sorted(tops - OURS - set(sys.stdlib_module_names)))


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("lightning_dist", ["timeline", "weights", "slurm", "ray", "tokens", "parquet"]),
        ("recipes", ["recipes", "huggingface", "parquet", "medmnist", "benchmark", "optuna", "driving", "slurm"]),
        ("tests", ["test"]),
    ],
)
def test_what_is_imported_is_declared(folder: str, extras: list[str]) -> None:
    distributions = metadata.packages_distributions()
    known = declared(*extras)
    for module, top in foreign(folder):
        names = {canonicalize_name(name) for name in distributions.get(top, [top])}
        assert names & known.keys(), f"{module} imports {top}, which pyproject.toml does not declare"


def test_the_wheel_imports_nothing_that_it_lacks() -> None:
    for module, tree in trees().items():
        assert not {name for name in imported(tree) if name.split(".")[0] in OURS - {"lightning_dist"}}, module


@pytest.mark.parametrize("name", SEEN_IN)
def test_releases_whose_private_names_were_not_read_are_left_out(name: str) -> None:
    """The bound is the next minor version; transformers', of which little is used, the next major one."""
    allowed = declared("weights", "litdata")[name].specifier
    major, minor, *_ = Version(SEEN_IN[name]).release
    following = f"{major + 1}.0.0" if name == "transformers" else f"{major}.{minor + 1}.0"
    assert allowed.contains(SEEN_IN[name])
    assert not allowed.contains(following)


def test_conf_has_every_option_of_the_strategy_with_its_default() -> None:
    config = yaml.safe_load((ROOT / "conf" / "strategy" / "hybrid.yaml").read_text())
    defaults = {name: p.default for name, p in inspect.signature(HybridStrategy).parameters.items()}
    assert [key for key in config if not key.startswith("_")] == [n for n in defaults if n not in BY_THE_TRAINER]
    layout = config.pop("layout")
    assert config.pop("pretrained") == "${oc.select:model.path,null}"  # of a model that has a directory
    assert HybridStrategy(layout).ranks.requested == Layout(dp_replicate=-1)
    for name, value in hydra.utils.instantiate({k: v for k, v in config.items() if not k.startswith("_")}).items():
        assert value == defaults[name], name
