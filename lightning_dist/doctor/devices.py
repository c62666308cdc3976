"""What the machine has: cores, accelerators and the links between them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from lightning_dist.doctor.ranks import run_ranks
from lightning_dist.doctor.results import CheckFailed, CheckSkipped, Finding
from lightning_dist.doctor.settings import Settings, num_cores

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEMORY = 64 * 2**20
"""Bytes: more than the 64 MB of a container that was started without ``--shm-size``, over which loaders' workers and
NCCL talk (https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html)."""

GIB = 2**30


def check_devices(settings: Settings) -> Finding:
    """Every device answers: a number is computed on it, and its memory is told."""
    details: dict[str, Any] = {"cores": num_cores(), "memory_gib": _memory_gib(), "shared_memory_gib": _shared_gib()}
    if settings.device_type == "cpu":
        return Finding(
            f"{details['cores']} cores, {details['memory_gib']} GiB; {settings.num_ranks} ranks on the CPU", details
        )
    details["accelerators"] = found = run_ranks(settings, look_at_device, settings.device_type)
    free = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).total
    if free and free <= LEAST_SHARED_MEMORY and settings.num_ranks > 1:
        raise CheckFailed(
            f"/dev/shm has {free // 2**20} MiB, over which processes talk to each other; start the container with "
            "--shm-size=1g or more, or --ipc=host",
            details,
        )
    names = sorted({device["name"] for device in found})
    return Finding(
        f"{len(found)} x {', '.join(names)}, {min(d['free_gib'] for d in found)} GiB or more free each", details
    )


def look_at_device(device_type: str) -> dict[str, Any]:
    """On a rank: what its device is, after it has computed something.

    Raises:
        CheckFailed: it computed something else.
    """
    index = int(os.environ["LOCAL_RANK"])
    device = torch.device(device_type, index)
    torch.accelerator.set_device_index(index)
    ones = torch.ones(256, 256, dtype=torch.float64, device=device)
    if float((ones @ ones).sum()) != 256.0**3:
        raise CheckFailed(f"{device} multiplies matrices of ones wrongly")
    free, total = torch.accelerator.get_memory_info(index)
    module = torch.get_device_module(device)
    name = module.get_device_name(index) if hasattr(module, "get_device_name") else str(device)
    return {"name": name, "free_gib": round(free / GIB, 1), "total_gib": round(total / GIB, 1)}


def check_links(settings: Settings) -> Finding:
    """Which accelerators reach each other's memory, and over what."""
    if settings.device_type != "cuda":
        raise CheckSkipped(f"links are told of CUDA devices, and the ranks are on {settings.device_type}")
    if settings.num_ranks < 2:
        raise CheckSkipped("one device has no link to another")
    access = run_ranks(settings, peer_access, settings.num_ranks, num_ranks=1, together=False)[0]
    links = links_by_pair(_ask_nvidia_smi("topo", "-m") or "")
    pairs = [(i, j) for i in range(settings.num_ranks) for j in range(i)]
    without = [f"{j}-{i}" for i, j in pairs if not access[i][j]]
    details = {"peer_access": access, "links": links}
    kinds = sorted({kind for (pair, kind) in links.items() if pair.count("GPU") == 2}) or ["unknown"]
    told = f"links of {', '.join(kinds)}"
    if without:
        return Finding(f"{told}; no peer access between {', '.join(without[:6])}: they talk over host memory", details)
    return Finding(f"{told}; every device reaches the memory of every other", details)


def peer_access(count: int) -> list[list[bool]]:
    """Whether a device can reach another's memory, by both numbers."""
    return [[i == j or torch.cuda.can_device_access_peer(i, j) for j in range(count)] for i in range(count)]


def links_by_pair(topology: str) -> dict[str, str]:
    """Reads ``nvidia-smi topo -m``: ``{"GPU0-GPU1": "NV12"}``. ``NV`` is NVLink with its number of links; ``SYS``,
    ``NODE``, ``PHB``, ``PXB`` and ``PIX`` are ways over PCIe, the longest first.
    """
    lines = [re.split(r"\s{2,}|\t", re.sub(r"\x1b\[[0-9;]*m", "", line).strip()) for line in topology.splitlines()]
    header = next((line for line in lines if line and line[0] == "GPU0"), [])
    columns = [name for name in header if name.startswith(("GPU", "NIC")) and name[3:].isdigit()]
    found = {}
    for name, *cells in (line for line in lines if line and line[0] in columns and line is not header):
        place = columns.index(name)
        found.update({f"{name}-{other}": cells[n] for n, other in enumerate(columns) if n > place and n < len(cells)})
    return found


def driver_version() -> str | None:
    """Of NVIDIA's driver; None where there is none."""
    versions = _ask_nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    return versions.split()[0] if versions and versions.split() else None


def _ask_nvidia_smi(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)


def _shared_gib() -> float | None:
    return round(shutil.disk_usage(SHARED_MEMORY).total / GIB, 2) if SHARED_MEMORY.is_dir() else None
