"""Private names of Lightning that a strategy of the Trainer stands on: processes, module, loaders, resuming."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
)
from lightning.fabric.utilities.init import _EmptyInit
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.types import _PATH as Path
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from torch.optim import Optimizer

from lightning_dist.compat.names import hands_on, uses

S = TypeVar("S", bound=type)

hands_on("lightning.fabric.utilities.types._PATH", "names what a checkpoint's path may be")

# --- processes ---


@uses("lightning.fabric.utilities.distributed._get_default_process_group_backend_for_device")
def default_backend(device: torch.device) -> str:
    """Names the backend of torch.distributed that Lightning takes for a device."""
    return _get_default_process_group_backend_for_device(device)


@uses("lightning.fabric.utilities.distributed._init_dist_connection")
def form_world(environment: ClusterEnvironment, backend: str, timeout: timedelta, device: torch.device) -> None:
    """Makes the process group of the world as Lightning does, if it is not there."""
    device_id = None if device.type == "cpu" else device
    _init_dist_connection(environment, backend, timeout=timeout, device_id=device_id)


@uses(
    "lightning.pytorch.strategies.launchers._SubprocessScriptLauncher",
    "lightning.pytorch.strategies.launchers._MultiProcessingLauncher",
    "lightning.pytorch.strategies.launchers._MultiProcessingLauncher._collect_rank_zero_results",
    "lightning.pytorch.strategies.Strategy._launcher",
)
def set_launcher(strategy: Any, start_method: str) -> None:
    """Lets a strategy of the Trainer start the other processes as Lightning does.

    Args:
        strategy: whose ``whole_state()``, in a rank, gives the state dict that the process which started them is sent.
        start_method: ``"popen"`` or one of multiprocessing.
    """
    if start_method == "popen":
        strategy._launcher = _SubprocessScriptLauncher(
            strategy.cluster_environment, strategy.ranks.num_processes, strategy.num_nodes
        )
    else:
        strategy._launcher = _GatheringLauncher(strategy, start_method=start_method)  # type: ignore[arg-type]


class _GatheringLauncher(_MultiProcessingLauncher):
    """Lightning's launcher by multiprocessing; the main process, which is no rank, gets whole weights, not shards."""

    def _collect_rank_zero_results(self, trainer: Any, results: Any) -> Any:
        module = trainer.lightning_module
        state = trainer.strategy.whole_state()
        module.state_dict = lambda: state
        try:
            return super()._collect_rank_zero_results(trainer, results)
        finally:
            del module.state_dict


def started_processes(launcher: Any) -> list[Any]:
    """The processes that a script's launcher has started, of this machine."""
    return list(launcher.procs) if isinstance(launcher, _SubprocessScriptLauncher) else []


# --- the strategy, its module and optimizers ---


@uses("lightning.pytorch.strategies.Strategy._lightning_module")
def told_of_module(strategy: S) -> S:
    """Tells a strategy class of the module at once: Lightning sets it, then refuses what the user compiled.

    ``strategy.take_module(module, is_new)`` is called when it is set.
    """

    def get(self: Any) -> Any:
        return vars(self).get("_module")

    def set_to(self: Any, module: Any) -> None:
        before, self._module = get(self), module
        self.take_module(module, module is not before)

    strategy._lightning_module = property(get, set_to)  # type: ignore[attr-defined]
    return strategy


@uses("lightning.pytorch.LightningModule._device_mesh")
def show_mesh(module: Any, mesh: Any) -> None:
    """Gives ``module.device_mesh`` to the user's configure_model."""
    module._device_mesh = mesh


@uses("lightning.fabric.utilities.init._EmptyInit")
def empty_init(enabled: bool) -> AbstractContextManager[Any]:
    """Leaves out the initialisation of layers, as ``Trainer.init_module(empty_init=True)`` asks for."""
    return _EmptyInit(enabled=enabled)


@uses("lightning.fabric.utilities.optimizer._optimizers_to_device")
def optimizers_to_device(optimizers: Iterable[Optimizer], device: torch.device) -> None:
    """Moves the states of optimizers."""
    _optimizers_to_device(optimizers, device)


@uses("lightning.pytorch.strategies.ParallelStrategy._layer_sync")
def sync_batchnorm(strategy: Any) -> None:
    """Applies what ``Trainer(sync_batchnorm=True)`` asks for to the strategy's model."""
    if strategy._layer_sync is not None:
        strategy._layer_sync.apply(strategy.model)


@uses("lightning.pytorch.strategies.Strategy._reset_optimizers_and_schedulers")
def forget_optimizers(strategy: Any) -> None:
    """Drops those of an earlier fit."""
    strategy._reset_optimizers_and_schedulers()


@uses("lightning.pytorch.core.module.LightningModule._trainer")
def trainer_of(module: Any) -> Any:
    """The Trainer that a module is attached to, or None."""
    return module._trainer


BEFORE_OPTIMIZER_STEP = "_after_closure"
"""A precision plugin's method that calls ``on_before_optimizer_step``, after which an optimizer steps."""

hands_on("lightning.pytorch.plugins.precision.Precision._after_closure", "shows finished gradients to hooks")


@uses("lightning.pytorch.LightningModule._compiler_ctx")
def compiled_steps(module: Any) -> dict[str, Any] | None:
    """What says how the steps of a module were compiled, where ``torch.compile`` was given the LightningModule."""
    return getattr(module, "_compiler_ctx", None)


@uses("lightning.pytorch.LightningModule._compiler_ctx")
def compile_steps(module: Any, steps: Iterable[str], context: dict[str, Any]) -> None:
    """Compiles the steps of a module as Lightning did."""
    for step in steps:
        setattr(module, step, context["dynamo_ctx"](getattr(module, step)))
    module._compiler_ctx = context


# --- loaders ---

PREPARE_LOADER = "_prepare_dataloader"
"""The data connector's method that makes a loader ready, and would give it a sampler of Lightning's."""

hands_on(
    "lightning.pytorch.trainer.connectors.data_connector._DataConnector._prepare_dataloader",
    "gives each data rank its part of a loader",
)


@uses("lightning.pytorch.Trainer._data_connector")
def data_connector(trainer: Any) -> Any:
    """What makes the Trainer's loaders ready."""
    return trainer._data_connector


@uses("lightning.pytorch.Trainer._accelerator_connector")
def accelerator_connector(trainer: Any) -> Any:
    """What knows the Trainer's ``use_distributed_sampler``."""
    return trainer._accelerator_connector


@uses(
    "lightning.pytorch.loops.fit_loop._FitLoop._combined_loader",
    "lightning.pytorch.loops.evaluation_loop._EvaluationLoop._combined_loader",
    "lightning.pytorch.loops.prediction_loop._PredictionLoop._combined_loader",
)
def loaders_of(loop: Any) -> Any:
    """The combined loader of a loop, or None before its data is set up."""
    return loop._combined_loader


def forget_loaders(loop: Any) -> None:
    """Lets a loop ask for its loaders anew."""
    loop._combined_loader = None


@uses("lightning.pytorch.utilities.combined_loader.CombinedLoader._mode")
def mode_of(combined: Any) -> str:
    """How a combined loader's loaders go together: ``"max_size_cycle"``, ``"sequential"`` and so on."""
    return combined._mode


@uses(
    "lightning.pytorch.utilities.combined_loader.CombinedLoader._iterables",
    "lightning.pytorch.utilities.combined_loader.CombinedLoader._spec",
    "torch.utils._pytree.tree_unflatten",
)
def show_loaders(combined: Any, loaders: list[object]) -> None:
    """Sets what ``trainer.train_dataloader`` and the like give; nothing is iterated by it."""
    combined._iterables = torch.utils._pytree.tree_unflatten(loaders, combined._spec)


@uses(
    "lightning.pytorch.loops.evaluation_loop._EvaluationLoop._max_batches",
    "lightning.pytorch.loops.prediction_loop._PredictionLoop._predictions",
)
def limits_of(loop: Any) -> list[int | float]:
    """How many batches an evaluation or prediction loop takes of each loader."""
    return loop.max_batches if hasattr(loop, "_predictions") else loop._max_batches


@uses("lightning.pytorch.Trainer._evaluation_loop")
def evaluation_loop(trainer: Any) -> Any:
    """The loop that evaluates or predicts now."""
    return trainer.predict_loop if trainer.predicting else trainer._evaluation_loop


# --- resuming a fit ---

LOAD_LOADER_STATES = "_load_combined_loader_states"
"""The fit loop's method that is called when loaders are there, and not yet asked."""
BEFORE_FETCH = "_on_before_fetch"
"""The epoch loop's method that is called before each training batch is asked for."""

hands_on("lightning.pytorch.loops.fit_loop._FitLoop._load_combined_loader_states", "begins loaders where a run goes on")
hands_on(
    "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._on_before_fetch",
    "notes random states before each training batch",
)


@uses("lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._should_accumulate")
def accumulates(trainer: Any) -> bool:
    """Whether the optimizer does not step after the batch that runs."""
    return bool(trainer.fit_loop.epoch_loop._should_accumulate())


@uses("lightning.pytorch.loops.fit_loop._FitLoop._data_fetcher")
def fetches_ahead(fit_loop: Any) -> bool:
    """Whether Lightning fetches one batch ahead, since it can't know by their number which is the last."""
    fetcher = fit_loop._data_fetcher
    return getattr(fetcher, "prefetch_batches", 0) > 0 and fetcher.length is None


@uses("lightning.pytorch.loops.fit_loop._FitLoop._loaded_from_state_dict")
def goes_on(fit_loop: Any) -> bool:
    """Whether a fit's progress was restored from a checkpoint."""
    return bool(fit_loop._loaded_from_state_dict)


@uses("lightning.pytorch.loops.fit_loop._FitLoop._combined_loader_states_to_load")
def has_loader_states(fit_loop: Any) -> bool:
    """Whether plain Lightning has states of loaders to go on by."""
    return bool(fit_loop._combined_loader_states_to_load)


def forget_loader_states(fit_loop: Any) -> None:
    """Takes off the loop the states of loaders that plain Lightning would go on by."""
    fit_loop._combined_loader_states_to_load = []


# --- callbacks ---


@uses("lightning.pytorch.callbacks.ModelCheckpoint._find_last_checkpoints")
def last_checkpoints(callback: Any, trainer: Any) -> set[Any]:
    """The files that Lightning chooses from for ``ckpt_path="last"``."""
    return set(callback._find_last_checkpoints(trainer))


MODULE_ATTRIBUTES = ("_trainer", "_hparams", "_hparams_initial")
"""Attributes in which a LightningModule keeps what Lightning gave it."""

for _name in MODULE_ATTRIBUTES:
    hands_on(f"lightning.pytorch.LightningModule.{_name}", "what belongs to Lightning among a module's attributes")
