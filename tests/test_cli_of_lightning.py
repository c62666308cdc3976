"""The strategy in LightningCLI: every way in which jsonargparse takes it, and what a run saves of its config."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import pytest
import yaml
from jsonargparse import lazy_instance
from lightning.pytorch.cli import LightningCLI

from lightning_dist import HybridStrategy, Layout, Spikes
from tests.support.command_line import Data, Saved
from tests.support.models import samples
from tests.support.scripts import ROOT, finish
from tests.support.source import PACKAGE

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


def test_a_fit_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    ours = [f"--trainer.strategy={CLASS}", "--trainer.strategy.layout=tp=1"]
    one = run_here(tmp_path / "one", "fit", "--trainer.max_epochs=2")
    run_here(tmp_path / "first", "fit", *ours, "--trainer.max_epochs=1")
    (checkpoint,) = (tmp_path / "first").rglob("*.ckpt")
    second = run_here(tmp_path / "second", "fit", *ours, "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}")
    assert second == one


# ---------------------------------------------------------------- the options

OF_A_CONFIG: dict[str, Any] = {
    "layout": {"dp_shard": 1},
    "fallback_layouts": ["dp_shard=2", {"tp": 2}],
    "shard_units": ["tests.support.models.Block"],
    "reshard_after_forward": False,
    "cpu_offload": False,
    "max_unit_parameters": 1000,
    "prefetch_units": 2,
    "tensor_plan": {"net.stem": "colwise"},
    "sequence_parallel": True,
    "loss_parallel": True,
    "pipeline_schedule": "GPipe",
    "num_microbatches": 4,
    "pipeline_cuts": ["net.blocks.1"],
    "pipeline_reshard": True,
    "pipeline_check": False,
    "pipeline_outputs": False,
    "batch_split": [0, None],
    "microbatch_weight": "tests.support.models.samples",
    "activation_checkpointing": "selective",
    "compile": {"mode": "default"},
    "checkpoint_format": "sharded",
    "async_save": True,
    "pretrained": "weights.safetensors",
    "snapshot_every_n_steps": 3,
    "max_time": "00:01:00:00",
    "report_stragglers": False,
    "on_nonfinite": "skip",
    "on_spike": {"class_path": "lightning_dist.Spikes", "init_args": {"threshold": 5.0}},
    "replay_every_n_steps": 7,
    "start_method": "spawn",
    "process_group_backend": "gloo",
    "timeout": "0:10:00",
}
BY_THE_TRAINER = {"accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin"}
AS_OBJECTS: dict[str, Any] = {
    "microbatch_weight": samples,
    "on_spike": Spikes(threshold=5.0),
    "timeout": timedelta(minutes=10),
}


def _given(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the strategy's constructor is given."""
    seen: list[dict[str, Any]] = []
    make = HybridStrategy.__init__

    def noting(self: HybridStrategy, **given: Any) -> None:
        seen.append(given)
        make(self, **given)

    noting.__signature__ = inspect.signature(make)  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(HybridStrategy, "__init__", noting)
        built(*arguments)
    return seen[-1]


def test_each_option_is_one_of_a_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = inspect.signature(HybridStrategy).parameters.keys()
    assert OF_A_CONFIG.keys() == options - BY_THE_TRAINER
    file = tmp_path / "config.yaml"
    value = {"class_path": CLASS, "init_args": OF_A_CONFIG}
    file.write_text(yaml.safe_dump({"trainer": {"strategy": value}}))
    given = _given(["--config", str(file)], monkeypatch)
    for name, value in (OF_A_CONFIG | AS_OBJECTS).items():
        told = given[name]
        if "layout" in name:
            told, value = Layout.parse_all(told), Layout.parse_all(value)
        assert str(told) == value if name == "pretrained" else told == value, name


@pytest.mark.parametrize(
    "argument",
    [
        "prefetch_units=many",
        "checkpoint_format=zip",
        "activation_checkpointing=some",
        "async_save=later",
        "num_microbatches=1.5",
        "on_nonfinite=ignore",
        "timeout=soon",
        "reshard_after=true",
    ],
)
def test_a_value_of_another_kind_is_told_by_its_option(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        built(f"--trainer.strategy={CLASS}", f"--trainer.strategy.{argument}")
    assert argument.partition("=")[0] in capsys.readouterr().err


# ---------------------------------------------------------------- the guide

GUIDE = (PACKAGE / "guides" / "lightning_cli.md").read_text()
FILES = {
    name: block
    for kind, block in re.findall(r"```(python|yaml)\n(.*?)```", GUIDE, flags=re.DOTALL)
    for name in re.findall(r"\A# (\S+)\n", block)
}
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.DOTALL) for line in block.strip().splitlines()
]
STRATEGIES = ["dp_shard=2", "dp_replicate=2", "dp_shard=2", "dp_replicate=2"]
"""Of the commands, one after the other."""


def _start(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a script of the guide as far as what it would fit; gives the Trainer and what it is given."""
    package, fits = ModuleType("my_package"), list[Any]()
    package.__dict__.update(Data=Data, Module=Saved)
    monkeypatch.setitem(sys.modules, "my_package", package)
    monkeypatch.setattr(sys, "argv", [script, *arguments])

    def fit(self: L.Trainer, model: Any, datamodule: Any = None, ckpt_path: str | None = None) -> None:
        fits.append((self, model, ckpt_path))

    monkeypatch.setattr(L.Trainer, "fit", fit)
    exec(FILES[script], {"__name__": "__main__"})
    (what,) = fits
    return what


@pytest.mark.parametrize(("command", "layout"), list(zip(COMMANDS, STRATEGIES, strict=True)))
def test_each_command_of_the_guide_makes_the_strategy_that_it_says(
    command: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(FILES["config.yaml"])
    _, script, *arguments = shlex.split(command)
    trainer, _, ckpt_path = _start(script, arguments, monkeypatch)
    assert trainer.strategy.ranks.layout == Layout.parse(layout)
    assert (ckpt_path is not None) == ("--ckpt_path" in command)


@pytest.mark.slow
def test_the_commands_of_the_guide_train_on_two_ranks(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "my_package.py").write_text("from tests.support.command_line import Data, Saved\nModule = Saved\n")
    for command in COMMANDS:
        process = subprocess.Popen(
            [sys.executable, *shlex.split(command)[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT},
            cwd=tmp_path,
        )
        status, output = finish(process, timeout=240)
        assert status == 0, output[-3000:]
    assert (tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "epoch=1-step=8.ckpt").exists()


def test_arguments_that_a_cli_links(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, model, _ = _start("linked.py", ["fit", *ONE, "--data.batch_size=7"], monkeypatch)
    assert isinstance(trainer.strategy, HybridStrategy)
    assert model.lr == pytest.approx(7e-3)


ALONE = """
import sys
import lightning as L
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

def by_name():
    try:
        return type(L.Trainer(accelerator="cpu", devices=1, logger=False, strategy="hybrid").strategy).__name__
    except ValueError as error:
        return str(error)

print("before:", by_name())
arguments = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false"]
assert "lightning_dist" not in sys.modules
for fabric in (True, False):
    try:
        L.Fabric(accelerator="cpu", devices=1, strategy="hybrid")
        print("fabric: there")
    except ValueError as error:
        print("fabric:", error)
    if fabric:
        strategy = ["--trainer.strategy=lightning_dist.HybridStrategy", "--trainer.strategy.layout=auto"]
        cli = LightningCLI(BoringModel, args=[*arguments, *strategy], run=False)
        print("class:", type(cli.trainer.strategy).__name__)
print("after:", by_name())
"""


@pytest.mark.slow
def test_a_script_that_imports_lightning_alone() -> None:
    """Lightning has no entry point for names of strategies; a class path imports the package, which has the name."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if re.match(r"(before|class|after|fabric): ", line)]
    assert said[0].startswith("before: You selected an invalid strategy name: `strategy='hybrid'`")
    assert said[1].startswith("fabric: You selected an invalid strategy name: `strategy='hybrid'`")
    assert said[2:] == ["class: HybridStrategy", "fabric: there", "after: HybridStrategy"]


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
