"""launcher=...: what can't be is said in one sentence, before anything is submitted."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import pytest
from hydra import compose, initialize_config_dir
from hydra.conf import ConfigSourceInfo
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lightning_dist import elastic
from recipes import fork_server, launchers, targets, train
from recipes.config_errors import ConfigError
from tests.launch.commands import ROOT

SLURM = "launcher=slurm", "trainer.num_nodes=2", "trainer.devices=2"
KUBERNETES = "launcher=kubernetes", "launcher.image=image:1", "launcher.output=/work", "trainer.devices=2"


@pytest.fixture
def composed(monkeypatch):
    """A config as ``recipes.train`` gets it."""

    def compose_here(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(ROOT / "conf"), **targets.VERSION_BASE):
            cfg = compose("config", ["hydra.runtime.output_dir=/nowhere", *overrides], return_hydra_config=True)
        monkeypatch.setattr(HydraConfig.instance(), "cfg", DictConfig({"hydra": cfg.hydra}))
        with open_dict(cfg):
            del cfg["hydra"]
        return cfg

    return compose_here


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([*SLURM, "strategy.layout.tp=3"], "strategy.layout: layout .*tp=3.* needs"),
        (["launcher=slurm"], "trainer.devices=auto, but launcher=slurm starts ranks on other machines; pass how many"),
        ([*SLURM, "optimized_metric=val/loss"], "optimized_metric is known when .*; pass launcher.wait=true"),
        ([*SLURM, "launcher.name=slrm"], "launcher.name=slrm is none of slurm, kubernetes, ray\nDid you mean slurm"),
        (KUBERNETES, r"launcher.output=/work is in no volume, .*; pass launcher.volumes="),
        (["launcher=kubernetes", "trainer.devices=2"], "needs a value for launcher.image"),
        (["launcher=torchrun"], "neither torchrun nor srun started this process; use launcher=local"),
    ],
)
def test_what_cannot_be_is_told(overrides: list[str], told: str, composed):
    with pytest.raises(ConfigError, match=told):
        train._run(composed(*overrides))


def test_what_a_plugin_of_hydra_adds_is_plain_for_ranks(composed):
    """A class of a launcher is another one within its job, where it can't be pickled."""

    @dataclass
    class Queue:
        _target_: str = "a.Launcher"
        folder: str = "${hydra.sweep.dir}/.queue"

    composed("hydra.sweep.dir=/sweep")
    with read_write(HydraConfig.instance().cfg.hydra):
        HydraConfig.instance().cfg.hydra.launcher = OmegaConf.structured(Queue)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(HydraConfig.instance().cfg)

    arrived = pickle.loads(pickle.dumps(launchers.hydra_config()))
    assert arrived.hydra.launcher == {"_target_": "a.Launcher", "folder": "/sweep/.queue"}
    assert arrived.hydra.runtime.output_dir == "/nowhere"


def test_a_config_of_this_machine_is_not_for_pods(composed):
    cfg = composed(*KUBERNETES, "launcher.volumes={work: {claim: mine, path: /work}}")
    source = ConfigSourceInfo("/home/me/conf", "file", "command-line")
    HydraConfig.instance().cfg.hydra.runtime.config_sources.append(source)
    with pytest.raises(
        ConfigError, match="--config-dir /home/me/conf is on this machine only; put what it has into conf"
    ):
        train._run(cfg)


def test_a_rank_that_is_there_joins_whatever_the_launcher(composed, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train, "_run_here", lambda cfg: (cfg.trainer.num_nodes, cfg.trainer.devices))
    for name in ("local", "torchrun", "slurm", "ray"):
        assert train._run(composed(f"launcher={name}")) == (2, 1)


def test_tasks_that_are_to_meet_are_agents(composed, monkeypatch):
    """One a machine, each of which starts the ranks of its own."""
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        elastic, "launch", lambda *args, num_processes, rendezvous, **kwargs: [(num_processes, rendezvous)]
    )
    monkeypatch.setattr(fork_server, "start", lambda cfg: None)
    meeting = "launcher.nnodes=1:2", "launcher.rdzv_endpoint=node0:29400", "strategy.layout={tp: 4}"
    num_processes, rendezvous = train._run(composed(*meeting, "trainer.devices=2"))
    assert (num_processes, rendezvous.min_nodes, rendezvous.max_nodes, rendezvous.endpoint) == (2, 1, 2, "node0:29400")
