"""How Fabric finds the strategy, starts its processes, and what is refused before they start."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning import Fabric

from lightning_dist import HybridFabricStrategy, HybridStrategy
from tests.fabric.loop import Loop, Training, train
from tests.support.parity import assert_equal
from tests.support.ranks import run_on_ranks
from tests.support.source import PACKAGE

SCRIPT = """
import torch
import lightning_dist
from lightning import Fabric
from lightning_dist import HybridFabricStrategy
from torch import nn
from torch.utils.data import DataLoader

def main(fabric):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.1))
    rows = torch.arange(32.0).reshape(8, 4) / 32
    for batch in fabric.setup_dataloaders(DataLoader(rows, batch_size=4 // fabric.strategy.num_data_ranks)):
        fabric.backward(model(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    total = sum(float(p.detach().sum()) for p in model.parameters())
    print(f"rank {{fabric.global_rank}} of {{fabric.world_size}}: {{fabric.strategy.layout}} {{total:.5f}}\\n", end="")

if __name__ == "__main__":
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=2, strategy={strategy})
    {launch}
"""
ROOT = str(Path(__file__).parent.parent.parent)
HERE = "fabric.launch(); main(fabric)"
THERE = "fabric.launch(main)"


def _run(folder: Path, strategy: str, launch: str = HERE, torchrun: bool = False) -> set[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT.format(strategy=strategy, launch=launch))
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if torchrun else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    done = subprocess.run(
        [sys.executable, *runner, str(script)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return set(re.findall(r"rank .*", done.stdout))


@pytest.mark.parametrize(
    ("strategy", "layout", "options"),
    [
        pytest.param("'hybrid'", "dp_replicate=2", {}, id="popen", marks=pytest.mark.slow),
        pytest.param(
            "HybridFabricStrategy('dp_shard=2', start_method='fork')",
            "dp_shard=2",
            {"launch": THERE},
            id="fork",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "HybridFabricStrategy('tp=2', start_method='spawn')",
            "tp=2",
            {"launch": THERE},
            id="spawn",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "HybridFabricStrategy('dp_shard=2')",
            "dp_shard=2",
            {"torchrun": True},
            id="torchrun",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], strategy: str, layout: str, options: dict[str, Any]
) -> None:
    alone: dict[str, Any] = {"__name__": "alone"}
    exec(SCRIPT.format(strategy="None", launch=""), alone)
    fabric = Fabric(accelerator="cpu", devices=1, strategy="hybrid")
    torch.manual_seed(0)
    fabric.launch(alone["main"])
    total = capsys.readouterr().out.split()[-1]
    assert _run(tmp_path, strategy, **options) == {f"rank {rank} of 2: {layout} {total}" for rank in (0, 1)}


def _layout_of_name() -> str:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="hybrid")
    fabric.launch()
    assert fabric.strategy.distributed_sampler_kwargs["num_replicas"] == 2  # known before the layout is decided
    assert float(fabric.all_reduce(torch.tensor(float(fabric.global_rank)))) == 0.5
    fabric.setup(torch.nn.Linear(2, 2))
    return str(fabric.strategy.layout)


def test_name_decides_by_what_fits() -> None:
    assert run_on_ranks(2, _layout_of_name) == ["dp_replicate=2"] * 2


def test_one_process_is_plain_fabric() -> None:
    loop = Loop(clip={"max_norm": 0.3}, accumulate=2, shuffle=True)
    training = Training(loop, "dp_replicate=1")
    assert training.model._forward_module is training.model.module  # not wrapped
    assert_equal(train(loop, None), train(loop, "dp_replicate=1"), 1e-6)


def test_pipeline_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pp=2 under Fabric.*HybridStrategy with a Trainer"):
        HybridFabricStrategy("pp=2")
    with pytest.raises(ValueError, match="pp=2 under Fabric"):
        Fabric(accelerator="cpu", devices=2, strategy=HybridFabricStrategy("pp=-1"))


def test_layout_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="layouts that fit"):
        Fabric(accelerator="cpu", devices=2, strategy=HybridFabricStrategy("dp_shard=3"))


def test_other_loops_strategies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"for Fabric there is HybridFabricStrategy"):
        Fabric(accelerator="cpu", devices=2, strategy=HybridStrategy("dp_shard=2"))
    with pytest.raises(ValueError, match=r"for a Trainer there is HybridStrategy"):
        L.Trainer(accelerator="cpu", devices=2, strategy=HybridFabricStrategy("dp_shard=2"))


def test_meta_is_refused() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, strategy="hybrid")
    fabric.launch()
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"meta.*init_module"):
        fabric.setup(model)


def test_options_of_a_trainer_that_fabric_has_not_are_in_the_guide_and_refused() -> None:
    of_trainer, of_fabric = (set(inspect.signature(of).parameters) for of in (HybridStrategy, HybridFabricStrategy))
    guide = (PACKAGE / "guides" / "fabric.md").read_text()
    rows = dict(re.findall(r"^\| (.*?) \| (.*?) \|$", guide, flags=re.MULTILINE))
    told = {name for row, said in rows.items() if said.startswith("no") for name in re.findall(r"`([a-z_]+)`", row)}
    lacking = of_trainer - of_fabric - {"precision_plugin"}  # which is precision here
    assert told == lacking
    for option in lacking:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            HybridFabricStrategy("dp_shard=2", **{option: None})  # type: ignore[arg-type]
