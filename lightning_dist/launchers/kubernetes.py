"""manifest: what Kubeflow's Trainer needs to run a job on Kubernetes.

Of the API ``trainer.kubeflow.org/v1alpha1`` (Trainer 2.x; its predecessor's ``PyTorchJob`` is not developed further): a
TrainingRuntime, which says how a pod looks, and a TrainJob that runs on it. A runtime of the job's own, rather than the
cluster's ``torch-distributed`` with patches, because the field for patches has changed its name between releases.

[Note: three kinds of restart]
A rank that fails is started again within its pod, by whoever starts the ranks there; a pod that fails, or whose machine
is gone, is made again by its Job (``backoffLimit``), under the same name, and joins the others anew; only when a Job
has given up are all pods made again (``failurePolicy`` of the JobSet).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

API_VERSION = "trainer.kubeflow.org/v1alpha1"

FIRST_POD = "$(PET_MASTER_ADDR):$(PET_MASTER_PORT)"
"""In a command: the address at which the pods of a job can meet. Kubernetes puts in what Trainer tells each pod."""

_NAME = "node"
"""By which Trainer knows the container that trains, and its Job."""


@dataclass(frozen=True)
class Kubernetes:
    """What a job asks Kubernetes for.

    Attributes:
        image: of the container.
        command: that each pod runs; it starts the ranks of the pod.
        num_nodes: pods.
        ranks_per_node: of each pod.
        name: of the job: lower case letters, digits and dashes.
        namespace: None for that of ``kubectl``.
        working_directory: of the command; None for that of the image.
        resources: of a pod, as requests and limits: ``{"cpu": 32, "memory": "256Gi", "nvidia.com/gpu": 8}``.
        shared_memory: the size of ``/dev/shm``, which is 64 MiB otherwise; it counts towards ``memory``.
        volumes: what the pods mount, by name: ``{"data": {"claim": "my-claim", "path": "/data"}}``.
        environment: variables.
        max_restarts: of a pod, and of all; see [Note: three kinds of restart].
    """

    image: str
    command: Sequence[str]
    num_nodes: int
    ranks_per_node: int
    name: str = "lightning-dist"
    namespace: str | None = None
    working_directory: str | None = None
    resources: Mapping[str, Any] = field(default_factory=dict)
    shared_memory: str = "16Gi"
    volumes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    max_restarts: int = 3

    def __post_init__(self) -> None:
        # the longest name that Kubernetes takes for a pod is 63, and Trainer adds to it
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?", self.name):
            raise ValueError(
                f"Kubernetes can't name a job {self.name!r}; "
                "take up to 50 lower case letters, digits and dashes, a letter first"
            )
        for name, volume in self.volumes.items():
            if missing := {"claim", "path"} - volume.keys():
                raise ValueError(f"volume {name} has no {min(missing)}; it needs a claim and the path to mount it at")

    def manifest(self) -> list[dict[str, Any]]:
        """The objects to create, in order."""
        metadata = {"name": self.name} | ({"namespace": self.namespace} if self.namespace else {})
        return [
            {"apiVersion": API_VERSION, "kind": "TrainingRuntime", "metadata": metadata, "spec": self._runtime()},
            {"apiVersion": API_VERSION, "kind": "TrainJob", "metadata": metadata, "spec": self._job()},
        ]

    def _job(self) -> dict[str, Any]:
        quantities = {name: str(quantity) for name, quantity in self.resources.items()}
        trainer: dict[str, Any] = {
            "image": self.image,
            "command": list(self.command),
            "numNodes": self.num_nodes,
            "numProcPerNode": self.ranks_per_node,
        }
        if self.environment:
            trainer["env"] = [{"name": name, "value": str(value)} for name, value in self.environment.items()]
        if quantities:
            trainer["resourcesPerNode"] = {"requests": quantities, "limits": dict(quantities)}
        runtime = {"apiGroup": API_VERSION.partition("/")[0], "kind": "TrainingRuntime", "name": self.name}
        return {"runtimeRef": runtime, "trainer": trainer}

    def _runtime(self) -> dict[str, Any]:
        job = {
            "name": _NAME,
            "template": {
                "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                "spec": {"backoffLimit": self.max_restarts, "template": {"spec": self._pod()}},
            },
        }
        return {
            "mlPolicy": {"numNodes": self.num_nodes, "torch": {}},
            "template": {"spec": {"failurePolicy": {"maxRestarts": self.max_restarts}, "replicatedJobs": [job]}},
        }

    def _pod(self) -> dict[str, Any]:
        memory = {"emptyDir": {"medium": "Memory", "sizeLimit": self.shared_memory}}
        claims = {name: {"persistentVolumeClaim": {"claimName": v["claim"]}} for name, v in self.volumes.items()}
        paths = {"shared-memory": "/dev/shm"} | {name: volume["path"] for name, volume in self.volumes.items()}
        container: dict[str, Any] = {
            "name": _NAME,
            "image": self.image,
            "volumeMounts": [{"name": name, "mountPath": path} for name, path in paths.items()],
        }
        if self.working_directory:
            container["workingDir"] = self.working_directory
        volumes = [{"name": name, **source} for name, source in ({"shared-memory": memory} | claims).items()]
        # a pod that is made again may get another machine; a container that is started again stays
        return {"restartPolicy": "Never", "containers": [container], "volumes": volumes}
