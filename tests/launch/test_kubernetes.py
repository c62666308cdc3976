"""launcher=kubernetes: the manifest is what Trainer's API takes, and says what was asked."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_dist.launchers.kubernetes import Kubernetes
from tests.launch.commands import run

CLAIM = {"work": {"claim": "my-claim", "path": "/work"}}


def job(**options: Any) -> Kubernetes:
    return Kubernetes("image:1", ["train"], 2, 8, **options)


def of_api(document: dict[str, Any]) -> dict[str, Any]:
    """An object as Trainer's own models read it, which are generated from the OpenAPI specification of its CRDs: they
    leave out what they do not know, and refuse what has the wrong type.
    """
    models: Any = importlib.import_module("kubeflow_trainer_api.models")
    return getattr(models, f"TrainerV1alpha1{document['kind']}").from_dict(document).to_dict()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "name": "mine",
            "namespace": "ml",
            "working_directory": "/app",
            "resources": {"nvidia.com/gpu": 8, "cpu": 32, "memory": "256Gi"},
            "volumes": CLAIM,
            "environment": {"NCCL_DEBUG": "INFO"},
        },
    ],
    ids=["least", "all"],
)
def test_the_api_knows_all_that_the_manifest_says(options: dict[str, Any]):
    for document in job(**options).manifest():
        assert of_api(document) == document


def test_pods_get_what_was_asked():
    runtime, train = job(volumes=CLAIM, resources={"cpu": 4}, shared_memory="2Gi", max_restarts=5).manifest()

    assert train["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert (train["spec"]["trainer"]["numNodes"], train["spec"]["trainer"]["numProcPerNode"]) == (2, 8)
    assert train["spec"]["trainer"]["resourcesPerNode"] == {"requests": {"cpu": "4"}, "limits": {"cpu": "4"}}
    jobs = runtime["spec"]["template"]["spec"]
    assert jobs["failurePolicy"]["maxRestarts"] == 5
    of_node = jobs["replicatedJobs"][0]["template"]["spec"]
    assert of_node["backoffLimit"] == 5
    pod = of_node["template"]["spec"]
    sources = {volume.pop("name"): volume for volume in pod["volumes"]}
    paths = {mount["mountPath"]: sources[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
    assert paths["/dev/shm"] == {"emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}
    assert paths["/work"] == {"persistentVolumeClaim": {"claimName": "my-claim"}}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"name": "My_Job"}, "can't name a job 'My_Job'; take up to 50 lower case letters"),
        ({"volumes": {"work": {"path": "/work"}}}, "volume work has no claim; it needs a claim and the path"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused(options: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        job(**options)


@pytest.mark.slow
def test_the_command_prints_a_manifest_whose_pods_run_the_same_recipe(tmp_path: Path):
    asked = ["recipe=language_model", "optimizer.lr=1e-3", "trainer.num_nodes=2", "trainer.devices=4"]
    asked += ["strategy.layout.tp=2", "launcher=kubernetes", "launcher.image=image:1", "launcher.output=/work/run"]
    asked += [
        "launcher.volumes={work: {claim: my-claim, path: /work}}",
        "launcher.resources={cpu: 32}",
        "launcher.min_nodes=1",
    ]
    done = run([sys.executable, "-m", "recipes.train", *asked, f"hydra.run.dir={tmp_path}"])

    assert done.returncode == 0, done.stderr
    runtime, train = yaml.safe_load_all(done.stdout)
    assert [of_api(document) for document in (runtime, train)] == [runtime, train]
    trainer = train["spec"]["trainer"]
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "4", "cpu": "32"}
    assert trainer["command"] == [
        *("python", "-m", "recipes.train", "recipe=language_model", "optimizer.lr=1e-3", "strategy.layout.tp=2"),
        *("trainer.devices=4", "launcher.nnodes=1:2", "launcher.rdzv_endpoint=$(PET_MASTER_ADDR):$(PET_MASTER_PORT)"),
        *("launcher.rdzv_id=lightning-dist", "launcher.max_restarts=3", "ckpt_path=last", "hydra.run.dir=/work/run"),
    ]
