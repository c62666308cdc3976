"""The strategy in LightningCLI: every way in which jsonargparse takes it, and what a run saves of its config."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from jsonargparse import lazy_instance
from lightning.pytorch.cli import LightningCLI

from lightning_dist import HybridStrategy, Layout
from tests.support.command_line import Data, Saved
from tests.support.models import samples
from tests.support.scripts import ROOT, finish

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI's args parameter", r"ignore:\s*skip_none parameter", "ignore:.*LeafSpec.*"
)
CLASS = "lightning_dist.HybridStrategy"
ONE = ["--trainer.accelerator=cpu", "--trainer.devices=1"]


SCRIPT = """
import json
import lightning_dist
from lightning.pytorch.cli import LightningCLI
from tests.support.command_line import Data, Saved

if __name__ == "__main__":
    cli = LightningCLI(Saved, Data)
    numbers = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    if cli.trainer.is_global_zero:
        print("numbers", json.dumps(numbers), flush=True)
"""


def built(*arguments: str, **settings: Any) -> HybridStrategy:
    """The strategy of a command line that runs nothing."""
    return LightningCLI(Saved, Data, args=[*ONE, *arguments], run=False, **settings).trainer.strategy  # type: ignore


@pytest.mark.parametrize(
    "arguments",
    [
        ["--trainer.strategy=hybrid"],
        [f"--trainer.strategy={CLASS}"],
        ["--trainer.strategy=HybridStrategy"],
        [f"--trainer.strategy={CLASS}", "--trainer.strategy.layout=auto"],
    ],
    ids=["name", "class", "short class", "automatic layout"],
)
def test_the_strategy_by_name_or_class(arguments: list[str]) -> None:
    strategy = built(*arguments)
    assert isinstance(strategy, HybridStrategy)
    assert strategy.ranks.requested is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--trainer.strategy.layout=tp=1,dp_shard=-1"],
        ['--trainer.strategy.layout={"tp": 1, "dp_shard": -1}'],
        ["--trainer.strategy.layout.tp=1", "--trainer.strategy.layout.dp_shard=-1"],
        ['--trainer.strategy.layout={"class_path": "lightning_dist.Layout", "init_args": {"dp_shard": -1}}'],
    ],
    ids=["string", "mapping", "axis by axis", "Layout"],
)
def test_the_layout_in_all_forms(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    parse = Layout.parse
    monkeypatch.setattr(Layout, "parse", lambda value: parsed.append(parse(value)) or parsed[-1])
    built(f"--trainer.strategy={CLASS}", *arguments)
    assert parsed[0] == Layout(dp_shard=-1)


def test_an_axis_that_is_none_is_named_with_the_closest() -> None:
    with pytest.raises(ValueError, match=r"layout has no axis 'dp_shar'; did you mean 'dp_shard'\?"):
        built(f"--trainer.strategy={CLASS}", '--trainer.strategy.layout={"dp_shar": 1}')


def test_arguments_that_are_lists_mappings_and_functions() -> None:
    strategy = built(
        f"--trainer.strategy={CLASS}",
        "--trainer.strategy.shard_units=[tests.support.models.Block]",
        '--trainer.strategy.tensor_plan={"net.stem": "colwise"}',
        "--trainer.strategy.batch_split=[0, null]",
        "--trainer.strategy.microbatch_weight=tests.support.models.samples",
        '--trainer.strategy.compile={"mode": "default"}',
        "--trainer.strategy.timeout=0:10:00",
        "--trainer.strategy.pipeline_cuts=[net.blocks.1]",
    )
    assert strategy.parts.module_setup.options.tensor.styles == {"net.stem": "colwise"}
    assert strategy.parts.module_setup.options.pipeline.batch_split == [0, None]
    assert strategy.parts.module_setup.options.pipeline.microbatch_weight is samples
    assert strategy.parts.module_setup.options.pipeline.cuts == ["net.blocks.1"]
    assert strategy.parts.module_setup.options.compile == {"mode": "default"}
    assert list(strategy.parts.module_setup.options.blocks(Saved())) == ["net.blocks.0", "net.blocks.1", "net.blocks.2"]


def _blocks(strategy: HybridStrategy, module: L.LightningModule) -> Any:
    return strategy.parts.module_setup.options.blocks(module)


@pytest.mark.parametrize("named", ["tests.support.models.Block", "torch.nn.LayerNorm"])
def test_blocks_by_the_path_of_their_class(named: str) -> None:
    module = Saved()
    path, _, name = named.rpartition(".")
    by_class = HybridStrategy(shard_units=[getattr(sys.modules[path], name)])
    assert _blocks(HybridStrategy(shard_units=[named]), module) == _blocks(by_class, module)


def _saving(strategy: HybridStrategy) -> Any:
    return strategy.parts.checkpoints.options


def test_a_config_file_with_class_path_and_init_args(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for init_args in ({"layout": {"dp_shard": 1}, "checkpoint_format": "sharded"}, None):
        value = {"class_path": CLASS} if init_args is None else {"class_path": CLASS, "init_args": init_args}
        file.write_text(yaml.safe_dump({"trainer": {"strategy": value}}))
        strategy = built("--config", str(file))
        assert isinstance(strategy, HybridStrategy)
        assert _saving(strategy).format == ("auto" if init_args is None else "sharded")
    strategy = built("--config", str(file), "--trainer.strategy.checkpoint_format=single")
    assert _saving(strategy).format == "single"


@pytest.mark.parametrize(
    "default",
    [
        lazy_instance(HybridStrategy, layout="dp_shard=1", checkpoint_format="sharded"),
        {"class_path": CLASS, "init_args": {"layout": {"dp_shard": 1}, "checkpoint_format": "sharded"}},
    ],
    ids=["lazy instance", "mapping"],
)
def test_a_default_of_the_script(default: Any) -> None:
    assert _saving(built(trainer_defaults={"strategy": default})).format == "sharded"
    changed = built("--trainer.strategy.async_save=true", trainer_defaults={"strategy": default})
    assert _saving(changed).format == "sharded"
    assert _saving(changed).in_background


def test_an_instance_as_a_default_is_refused_as_any_strategy_of_lightnings_is() -> None:
    said = []
    for strategy in (HybridStrategy("dp_shard=1"), L.pytorch.strategies.DDPStrategy()):
        with pytest.raises(ValueError, match="lazy instance") as error:
            built(trainer_defaults={"strategy": strategy})
        said.append(str(error.value))
    assert said[0] == said[1]


def test_variables_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_TRAINER__STRATEGY", "hybrid")
    assert isinstance(built(parser_kwargs={"default_env": True}), HybridStrategy)


@pytest.mark.parametrize(
    "strategy",
    [
        ["--trainer.strategy=hybrid"],
        [f"--trainer.strategy={CLASS}", "--trainer.strategy.layout=dp_shard=-1"],
        [f"--trainer.strategy={CLASS}", '--trainer.strategy.layout={"tp": -1}', "--trainer.strategy.async_save=true"],
    ],
)
def test_a_printed_config_gives_the_same_config(
    strategy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit):
            built(*arguments, "--print_config")
        return capsys.readouterr().out

    first = printed(*strategy)
    (tmp_path / "config.yaml").write_text(first)
    assert printed("--config", str(tmp_path / "config.yaml")) == first
    assert isinstance(built("--config", str(tmp_path / "config.yaml")), HybridStrategy)


def run_here(folder: Path, *arguments: str) -> dict[str, float]:
    """What a command logs in one process."""
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    every = [*arguments, *ONE, *quiet, f"--trainer.default_root_dir={folder}"]
    cli = LightningCLI(Saved, Data, args=every, seed_everything_default=1, save_config_kwargs={"overwrite": True})
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


def test_fit_validate_and_test_as_plain_lightning_does(tmp_path: Path) -> None:
    for command in ("fit", "validate", "test"):
        fit = ["--trainer.max_epochs=2"] if command == "fit" else []
        plain = run_here(tmp_path / "plain", command, *fit)
        ours = run_here(
            tmp_path / "ours", command, *fit, f"--trainer.strategy={CLASS}", "--trainer.strategy.layout=tp=1"
        )
        assert ours == plain
        assert plain or command == "test"


@pytest.mark.parametrize(
    "init_args",
    [
        pytest.param({"layout": {"dp_shard": 2}}, id="popen", marks=pytest.mark.slow),
        pytest.param({"layout": {"dp_replicate": 2}, "start_method": "spawn"}, id="spawn", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_from_a_config_file_and_save_it(init_args: dict[str, Any], tmp_path: Path) -> None:
    script, file, root = tmp_path / "script.py", tmp_path / "config.yaml", tmp_path / "run"
    script.write_text(SCRIPT)
    strategy = {"class_path": CLASS, "init_args": init_args}
    trainer = {
        "accelerator": "cpu",
        "devices": 2,
        "strategy": strategy,
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(root),
    }
    file.write_text(yaml.safe_dump({"seed_everything": 1, "trainer": trainer, "data": {"batch_size": 8}}))
    one = run_here(tmp_path / "one", "fit", "--trainer.max_epochs=2")
    ours = _numbers(script, "fit", "--config", str(file))
    assert ours.keys() == one.keys()
    for name, value in one.items():
        assert ours[name] == pytest.approx(value, rel=1e-4), name

    saved = root / "config.yaml"
    assert yaml.safe_load(saved.read_text())["trainer"]["strategy"]["class_path"] == CLASS
    (checkpoint,) = root.rglob("*.ckpt")
    elsewhere = [f"--ckpt_path={checkpoint}", f"--trainer.default_root_dir={tmp_path / 'again'}"]
    again = _numbers(script, "validate", "--config", str(_of_evaluation(saved)), *elsewhere)
    assert again["val/loss"] == pytest.approx(one["val/loss"], rel=1e-4)
    if checkpoint.is_file():
        assert Saved.load_from_checkpoint(checkpoint).lr == 1e-2


def _of_evaluation(saved: Path) -> Path:
    """The saved config without what only fit knows, as Lightning asks for it."""
    config = yaml.safe_load(saved.read_text())
    kept = {key: value for key, value in config.items() if key in ("seed_everything", "trainer", "model", "data")}
    file = saved.with_name("evaluation.yaml")
    file.write_text(yaml.safe_dump(kept))
    return file


def _numbers(script: Path, *arguments: str) -> dict[str, float]:
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT},
        cwd=script.parent,
    )
    status, output = finish(process)
    assert status == 0, output[-3000:]
    (line,) = [line for line in output.splitlines() if line.startswith("numbers ")]
    return json.loads(line.removeprefix("numbers "))
