"""What the jobs of a sweep share on this machine: its accelerators, or its cores."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from omegaconf import DictConfig, OmegaConf

from recipes.config_errors import ConfigError

VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
"""By which variable a process is shown some of the accelerators only, by their type in torch."""


@dataclass
class Machine:
    """Slots for jobs, and the devices that are dealt out to them.

    Args:
        slots: jobs at once, at most; None: as many as have a rank for each device or core.
        cores: of the processor.
        devices: accelerators, as ``variable`` names them; none where jobs run on the CPU.
        variable: shows a process some of them.
    """

    slots: int | None
    cores: int
    devices: tuple[str, ...] = ()
    variable: str = ""
    _free: list[str] = field(init=False)
    _num_running: int = 0

    def __post_init__(self) -> None:
        self._free = list(self.devices or map(str, range(self.cores)))

    @classmethod
    def here(cls, slots: int | None, with_accelerators: bool) -> Machine:
        """This one.

        Raises:
            ConfigError: accelerators of a type that can't be shown to processes one by one.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if not with_accelerators:
            return cls(slots, cores)
        import torch  # slow

        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None or not torch.accelerator.is_available():
            return cls(slots, cores)
        if accelerator.type not in VISIBLE:
            raise ConfigError(f"hydra/launcher=slots can't deal out devices of type {accelerator.type}; leave it out")
        variable, count = VISIBLE[accelerator.type], torch.accelerator.device_count()
        shown = [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]
        return cls(slots, cores, tuple(shown or map(str, range(count))), variable)

    def needs(self, cfg: DictConfig) -> int:
        """The devices or cores that a job takes: one for each rank, at most all.

        Raises:
            ConfigError: it names devices rather than their number, or something that is no number.
        """
        devices, on_accelerator = cfg.trainer.devices, self.devices and cfg.trainer.accelerator != "cpu"
        if on_accelerator and (OmegaConf.is_list(devices) or "," in str(devices)):
            raise ConfigError(
                f"trainer.devices={devices} names devices, which hydra/launcher=slots deals out; pass their number"
            )
        from recipes.train import count_devices  # which imports this package

        if on_accelerator:
            share = len(self.devices) // (self.slots or 1)
            wanted = share if devices in ("auto", -1, "-1") else count_devices(devices, "cpu")
            return max(1, min(wanted, len(self.devices)))
        if self.slots is not None or self.devices:
            return 0  # cores are shared
        return min(count_devices(devices, "cpu"), self.cores)

    @property
    def has_slot(self) -> bool:
        """Whether a job that needs little could start."""
        return bool(self._free) and (self.slots is None or self._num_running < self.slots)

    def take(self, needed: int) -> list[str] | None:
        """A slot and so many devices or cores for a job; None while there are none."""
        if needed > len(self._free) or (self.slots is not None and self._num_running >= self.slots):
            return None
        self._num_running += 1
        taken, self._free = self._free[:needed], self._free[needed:]
        return taken

    def give_back(self, taken: list[str]) -> None:
        """What a job had, which has ended."""
        self._num_running -= 1
        self._free = sorted([*self._free, *taken], key=lambda name: (len(name), name))

    def environment(self, taken: list[str], num_ranks: int) -> dict[str, str]:
        """Variables for a job: it sees its own devices, and its ranks use its share of the cores, not all."""
        at_once = self.slots or max(1, len(self.devices or range(self.cores)) // max(1, num_ranks))
        threads = max(1, self.cores // (at_once * max(1, num_ranks)))
        variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        return variables | ({self.variable: ",".join(taken)} if self.devices and taken else {})
