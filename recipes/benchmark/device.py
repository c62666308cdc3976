"""The device that is measured: chosen before the ranks start, and waited for before a clock is read."""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist

CHOICES = ("auto", "cpu", "accelerator")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """The option of the command."""
    parser.add_argument(
        "--device",
        choices=CHOICES,
        default="auto",
        help="accelerator: one a rank; auto: that where there are as many as ranks, else cpu (default: auto)",
    )


def device_type(choice: str, ranks: int) -> str:
    """What a choice means here: ``cpu``, ``cuda`` and so on.

    Raises:
        ValueError: there are too few accelerators.
    """
    accelerator = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count() if accelerator is not None else 0
    if choice == "accelerator" and count < ranks:
        raise ValueError(f"--device accelerator with {ranks} ranks: this machine has {count}; pass --device cpu")
    if choice == "cpu" or accelerator is None or count < ranks:
        return "cpu"
    return accelerator.type


def join_process_group(kind: str, store: dist.Store | None = None) -> None:
    """Forms the process group of the ranks of this machine, with the backend of a device, which becomes the rank's own.

    Args:
        kind: of device.
        store: where the ranks meet; None where the launcher says.
    """
    if kind != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = dist.get_default_backend_for_device(kind)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)


def rank_device() -> torch.device:
    """Of this rank, by the backend of its process group."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or dist.get_backend() != dist.get_default_backend_for_device(accelerator):
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def synchronize() -> None:
    """Waits until the rank's device has done all that it was given; nothing on the CPU."""
    if dist.is_initialized() and rank_device().type != "cpu":
        torch.accelerator.synchronize()
