"""The device of the ranks and Trainers of the tests: the CPU, or what ``pytest --device cuda`` says.

Ranks of the pool take one GPU each, or with ``--share-devices`` those that there are, several to a GPU; their process
group has gloo for tensors on the CPU beside the backend of the GPUs.
A test that names the CPU itself stays there: meshes and tensors that it makes, and what runs in processes of its own
(scripts, recipes, launches of Fabric, the doctor).
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import CUDAAccelerator

VARIABLE = "LIGHTNING_DIST_TESTS_DEVICE"
"""Tells the pool's processes."""

SHARED = "LIGHTNING_DIST_TESTS_SHARE_DEVICES"


def choose(device: str, shared: bool = False) -> None:
    """Says it to this process and those that it starts. Before the tests are imported."""
    os.environ[VARIABLE] = device
    os.environ[SHARED] = "1" if shared else ""
    if device == "cuda":
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # counting devices would else keep forks from using them


def device_type() -> str:
    """``"cpu"`` or ``"cuda"``."""
    return os.environ.get(VARIABLE, "cpu")


def is_shared() -> bool:
    """Whether several ranks may have one device."""
    return bool(os.environ.get(SHARED))


def skip_without(num_ranks: int) -> None:
    """Skips the test if there are fewer GPUs than it takes ranks."""
    if device_type() != "cpu" and not is_shared() and (there := torch.accelerator.device_count()) < num_ranks:
        pytest.skip(f"takes {num_ranks} ranks on a {device_type()} device each, and there are {there}")


def take(rank: int) -> torch.device:
    """This rank's device, made the current one; float32 is computed as such."""
    if device_type() == "cpu":
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False
    index = rank
    if is_shared():
        index %= torch.accelerator.device_count()
        os.environ["NCCL_HOSTID"] = f"rank {rank}"  # NCCL refuses ranks of one machine that have the same GPU
        patch = pytest.MonkeyPatch()  # for good
        patch.setattr(CUDAAccelerator, "parse_devices", staticmethod(lambda devices: list(range(int(devices)))))
        patch.setattr(CUDAAccelerator, "get_parallel_devices", staticmethod(_devices))
    torch.accelerator.set_device_index(index)
    return torch.device(device_type(), index)


def _devices(ranks: list[int]) -> list[torch.device]:
    return [torch.device(device_type(), rank % torch.accelerator.device_count()) for rank in ranks]


def backend(device: torch.device) -> str:
    """Of the pool's process group, for tensors on the device and on the CPU."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
