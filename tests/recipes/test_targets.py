"""What a config may name in ``_target_``, and who may add to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lightning_dist.explain import build_deferred
from recipes import targets
from recipes.config_errors import ConfigError
from recipes.explain import from_overrides
from tests.launch.commands import command, run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("named", sorted((ROOT / "conf").rglob("*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_what_conf_names_is_allowed(named: Path) -> None:
    for key, target in targets._targets(OmegaConf.to_container(OmegaConf.load(named)), ""):
        targets._check_found(key, target)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.run",
        "torch.load",
        "torch.hub.load",
        "hydra.utils.instantiate",
        "my_package.Model",
        "torch_nn.Linear",
        "torch.optimum.SGD",
    ],
)
def test_another_target_is_refused_before_it_is_called(target: str, tmp_path: Path) -> None:
    node = OmegaConf.create({"parts": [{"_target_": target, "_args_": [f"touch {tmp_path}/called"]}]})
    with pytest.raises(ConfigError, match=rf"^data\.parts\.0\._target_: {target} is not among .*targets=\["):
        targets.instantiate(node, "data")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "really"),
    [
        ("torch.utils.data.dataloader.os.system", "posix.system"),
        ("torch.nn.modules.module.torch.load", "torch.serialization.load"),
        ("torchmetrics.metric.functools.partial", "functools.partial"),
    ],
)
def test_what_is_found_under_an_allowed_name_has_to_be_allowed_too(target: str, really: str) -> None:
    with pytest.raises(ConfigError, match=f"{target}, which is {really}, is not among"):
        targets.instantiate({"_target_": target})


def test_an_interpolated_target_is_seen() -> None:
    config = OmegaConf.create({"which": "os.system", "model": {"_target_": "${which}", "command": "true"}})
    targets.check(OmegaConf.create({"model": config.model}))  # not known before it is resolved
    with pytest.raises(ConfigError, match=r"os\.system is not among"):
        targets.instantiate(config.model, "model")


def test_the_command_line_and_conf_add_packages() -> None:
    node = {"_target_": "tests.support.models.Block", "width": 4}
    empty = OmegaConf.create({"targets": []})
    for allowed in (
        targets.allowed_by_user(empty, ["-m", "seed=1", "targets=[tests.support.models,elsewhere]"]),
        targets.allowed_by_user(empty, ["++targets=tests.support.models.Block"]),
        targets.allowed_by_user(OmegaConf.create({"targets": ["tests"]}), []),
    ):
        with targets.allow(allowed):
            assert targets.instantiate(node).up.in_features == 4
    with pytest.raises(ConfigError):
        targets.instantiate(node)


def test_explain_takes_the_same_setting() -> None:
    overrides = ["model._target_=tests.recipes.test_targets.classifier", "trainer.devices=1"]
    with pytest.raises(ValueError, match=r"test_targets\.classifier is not among"):
        from_overrides(overrides)
    make = from_overrides([*overrides, "targets=[tests.recipes]"]).make
    assert any(isinstance(layer, torch.nn.Linear) for layer in build_deferred(make).modules())


def classifier(**_: object) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))


def test_a_file_can_not_allow_itself_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        f"# @package _global_\ntargets: [os]\nmodel:\n  _target_: os.system\n  command: touch {tmp_path}/called\n"
    )
    start = [*command(directory=tmp_path / "run")[:3], "--config-dir", str(tmp_path), "experiment=mine"]
    done = run([*start, f"hydra.run.dir={tmp_path / 'run'}"])
    assert done.returncode == 1
    assert "targets: os comes from a config file that this run chose" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "called").exists()


@pytest.mark.slow
def test_a_run_warns_of_nothing_in_hydra(tmp_path: Path) -> None:
    done = run(command("trainer.devices=1", directory=tmp_path))
    assert done.returncode == 0, done.stderr
    assert "version_base" not in done.stderr
    assert "whitelist" not in done.stderr
