"""Private names of Lightning's Fabric."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, TypeVar

from lightning.fabric.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.fabric.strategies.strategy import _apply_filter as apply_filter
from lightning.fabric.strategies.strategy import _BackwardSyncControl as BackwardSyncControl
from lightning.fabric.strategies.strategy import _validate_keys_for_strict_loading as validate_keys
from lightning.fabric.utilities.types import _Stateful as Stateful

from lightning_dist.compat.names import hands_on, uses

S = TypeVar("S", bound=type)

_STRATEGIES = "lightning.fabric.strategies"
hands_on(
    {
        f"{_STRATEGIES}.launchers._MultiProcessingLauncher": "starts processes by multiprocessing",
        f"{_STRATEGIES}.launchers._SubprocessScriptLauncher": "starts processes by running the script again",
        f"{_STRATEGIES}.strategy._apply_filter": "leaves out of a checkpoint what fabric.save says",
        f"{_STRATEGIES}.strategy._BackwardSyncControl": "serves fabric.no_backward_sync",
        f"{_STRATEGIES}.strategy._validate_keys_for_strict_loading": "refuses a checkpoint as Fabric does",
        "lightning.fabric.utilities.types._Stateful": "tells what has a state_dict, which is saved",
    }
)


@uses(f"{_STRATEGIES}.Strategy._configure_launcher", f"{_STRATEGIES}.Strategy._backward_sync_control")
@uses(f"{_STRATEGIES}.DDPStrategy._set_world_ranks", f"{_STRATEGIES}.DDPStrategy._num_nodes")
@uses(f"{_STRATEGIES}.Strategy._launcher")
def fabric_hooks(strategy: S) -> S:
    """Lets Fabric find, under its private names, what a strategy class has under public ones.

    They are ``set_world_ranks()``, called as soon as devices and nodes are known; ``launcher_of_processes()``, the
    launcher or None; ``num_nodes``; and ``sync_control``.
    """

    def configure_launcher(self: Any) -> None:
        self._launcher = self.launcher_of_processes()

    strategy._set_world_ranks = lambda self: self.set_world_ranks()  # type: ignore[attr-defined]
    strategy._configure_launcher = configure_launcher  # type: ignore[attr-defined]
    strategy._num_nodes = property(attrgetter("num_nodes"), lambda self, number: setattr(self, "num_nodes", number))  # type: ignore[attr-defined]
    strategy._backward_sync_control = property(attrgetter("sync_control"), lambda *_: None)  # type: ignore[attr-defined]
    return strategy


def launcher(strategy: Any, start_method: str) -> Any:
    """Starts the other processes as Fabric does."""
    if start_method == "popen":
        return _SubprocessScriptLauncher(strategy.cluster_environment, strategy.ranks.num_processes, strategy.num_nodes)
    return _MultiProcessingLauncher(strategy, start_method=start_method)  # type: ignore[arg-type]


@uses("lightning.fabric.utilities.distributed._DatasetSamplerWrapper._sampler")
def wrapped_sampler(sampler: Any) -> Any:
    """The user's sampler inside of one that Fabric has put around it."""
    return sampler.dataset._sampler
