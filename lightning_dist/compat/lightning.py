"""Private names of Lightning's Trainer: what a module logs, processes, modules, loops, loaders, callbacks."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.device_dtype_mixin import _update_properties as set_device
from lightning.fabric.utilities.distributed import _get_default_process_group_backend_for_device as default_backend
from lightning.fabric.utilities.distributed import _init_dist_connection
from lightning.fabric.utilities.init import _EmptyInit as empty_init
from lightning.fabric.utilities.optimizer import _optimizers_to_device as optimizers_to_device
from lightning.fabric.utilities.types import _PATH as Path
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper as IndexBatchSamplerWrapper
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector as LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata as Metadata
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection as ResultCollection
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric as ResultMetric
from lightning.pytorch.trainer.connectors.logger_connector.result import _Sync as Sync
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.tuner.lr_finder import _LRCallback as LearningRateCallback
from lightning.pytorch.utilities.data import _extract_batch_size as sizes_in_batch
from lightning.pytorch.utilities.data import _update_dataloader as with_sampler
from torch import Tensor

from lightning_dist.compat.names import getter, hands_on, method, name_of, setter, uses

S = TypeVar("S", bound=type)

_PL = "lightning.pytorch"
_RESULT = f"{_PL}.trainer.connectors.logger_connector.result"
_LOGGERS = f"{_PL}.trainer.connectors.logger_connector.logger_connector._LoggerConnector"
_BACKEND = "lightning.fabric.utilities.distributed._get_default_process_group_backend_for_device"
_FIT = f"{_PL}.loops.fit_loop._FitLoop"
_EPOCH = f"{_PL}.loops.training_epoch_loop._TrainingEpochLoop"
_EVALUATION = f"{_PL}.loops.evaluation_loop._EvaluationLoop"
_PREDICTION = f"{_PL}.loops.prediction_loop._PredictionLoop"
_COMBINED = f"{_PL}.utilities.combined_loader.CombinedLoader"
_LAUNCHERS = f"{_PL}.strategies.launchers"
_CONNECTOR = f"{_PL}.trainer.connectors.data_connector"

hands_on(
    {
        _LOGGERS: "says when somebody is about to read logged values",
        f"{_RESULT}._ResultCollection": "holds what a loop logs, by name",
        f"{_RESULT}._ResultMetric": "holds one logged value; made where only other ranks logged it",
        f"{_RESULT}._Metadata": "how a value is logged; sent between ranks that log different names",
        f"{_RESULT}._Sync": "how Lightning itself would reduce a logged value",
        f"{_EPOCH}._results": "what a loop has logged",
        f"{_PL}.utilities.data._extract_batch_size": "the sizes found in a batch, of each of its tensors",
        _BACKEND: "names the backend of torch.distributed for a device",
        "lightning.fabric.utilities.device_dtype_mixin._update_properties": "says where a partly meta module is",
        "lightning.fabric.utilities.init._EmptyInit": "leaves out the initialisation of layers, as init_module may ask",
        "lightning.fabric.utilities.optimizer._optimizers_to_device": "moves the states of optimizers",
        "lightning.fabric.utilities.types._PATH": "names what a checkpoint's path may be",
        f"{_PL}.overrides.distributed._IndexBatchSamplerWrapper": "notes the indices while predicting",
        f"{_PL}.utilities.data._update_dataloader": "makes a loader, of the user's class, with another sampler",
        f"{_PL}.tuner.lr_finder._LRCallback": "sees the losses of the finder of a learning rate",
    }
)

# --- what a module logs ---

EXTRACT_BATCH_SIZE = name_of(f"{_RESULT}._ResultCollection._extract_batch_size", "finds a step's value's weight")
TO_TENSOR = name_of(f"{_PL}.LightningModule._LightningModule__to_tensor", "the method by which log takes a number")
HOOK_CALLERS = frozenset(
    name_of(f"{_PL}.trainer.call.{name}", "the function below which a hook of the user's runs")
    for name in ("_call_callback_hooks", "_call_lightning_module_hook", "_call_strategy_hook")
)
logger_connector = getter(f"{_PL}.Trainer._logger_connector", "what is told of batches, and reads values")
running_hook = getter(f"{_PL}.LightningModule._current_fx_name", "the hook that Lightning runs now, or None")
results_of = getter(f"{_PL}.Trainer._results", "what a loop, or the one that runs, has logged; or None")
epoch_names = method(f"{_RESULT}._ResultCollection._forked_name", "the names of a value; on_step=False")


callback_metrics_of = getter(f"{_LOGGERS}._callback_metrics", "the values that callbacks and schedulers read, kept")
set_has_batches = setter(
    f"{_LOGGERS}._first_loop_iter", "says before a batch whether it is the epoch's first: False lets values add up"
)


@uses(f"{_LOGGERS}._first_loop_iter")
def has_batches(trainer: pl.Trainer) -> bool:
    """Whether the epoch that runs has had a batch, as the logger connector sees it, and has not ended."""
    return trainer._logger_connector._first_loop_iter is not None


@uses(f"{_RESULT}._Sync._fn")
def leave_unreduced(meta: Metadata) -> None:
    """Keeps Lightning from reducing a logged value itself; its ``sync_dist`` stays to be seen."""
    meta.sync._fn = Sync.no_op


@uses(f"{_RESULT}._Metadata._sync", f"{_RESULT}._Sync._should")
def packed_metadata(meta: Metadata) -> dict[str, Any]:
    """How a value is logged, without what belongs to this process; see :func:`unpacked_metadata`."""
    fields = {name: getattr(meta, name) for name in meta.__dataclass_fields__ if name != "_sync"}
    return fields | {"should": meta.sync.should}


def unpacked_metadata(packed: dict[str, Any]) -> Metadata:
    """What :func:`packed_metadata` packed on another rank."""
    meta = Metadata(**{name: value for name, value in packed.items() if name != "should"})
    meta.sync = Sync(_should=packed["should"])
    return meta


def reduce_by(meta: Metadata, reduce: Any) -> None:
    """Gives a value the function by which Lightning would reduce it, which has to be the strategy's own, or it errs."""
    meta.sync = Sync(fn=reduce, _should=meta.sync.should)


def logged_tensor(device: torch.device, value: Any, name: str) -> Tensor:
    """The number that ``log`` takes of a value, without asking a module for its device."""
    to_tensor: Any = getattr(pl.LightningModule, TO_TENSOR)
    return to_tensor(SimpleNamespace(device=device), value, name)


# --- processes ---


@uses("lightning.fabric.utilities.distributed._init_dist_connection")
def form_world(environment: ClusterEnvironment, backend: str, timeout: timedelta, device: torch.device) -> None:
    """Makes the process group of the world as Lightning does, if it is not there."""
    # bound to a device, its groups would be split from it, which gloo beside another backend may not be (torch 2.14)
    device_id = None if device.type == "cpu" or ":" in backend else device
    _init_dist_connection(environment, backend, timeout=timeout, device_id=device_id)


@uses(f"{_LAUNCHERS}._SubprocessScriptLauncher", f"{_PL}.strategies.Strategy._launcher")
def set_launcher(strategy: Any, start_method: str) -> None:
    """Lets a strategy start the other processes as Lightning does, by ``"popen"`` or a method of multiprocessing.

    Its ``whole_state()``, in a rank, gives the state dict that the process which started them is sent.
    """
    if start_method == "popen":
        num_processes = strategy.ranks.num_processes
        strategy._launcher = _SubprocessScriptLauncher(strategy.cluster_environment, num_processes, strategy.num_nodes)
    else:
        strategy._launcher = _GatheringLauncher(strategy, start_method=start_method)  # type: ignore[arg-type]


@uses(f"{_LAUNCHERS}._MultiProcessingLauncher", f"{_LAUNCHERS}._MultiProcessingLauncher._collect_rank_zero_results")
class _GatheringLauncher(_MultiProcessingLauncher):
    """Lightning's launcher by multiprocessing; the main process, which is no rank, gets whole weights, not shards."""

    def _collect_rank_zero_results(self, trainer: Any, results: Any) -> Any:
        module, state = trainer.lightning_module, trainer.strategy.whole_state()
        module.state_dict = lambda: state
        try:
            return super()._collect_rank_zero_results(trainer, results)
        finally:
            del module.state_dict


def started_processes(launcher: Any) -> list[Any]:
    """The processes that a script's launcher has started, of this machine."""
    return list(launcher.procs) if isinstance(launcher, _SubprocessScriptLauncher) else []


_OBSERVER = "lightning.fabric.strategies.launchers.subprocess_script._ChildProcessObserver"


@uses(_OBSERVER, f"{_OBSERVER}._child_processes")
def stop_observing_processes() -> None:
    """Lets processes that a script's launcher started end before this one: Lightning kills it where one of them has
    ended with another status than 0.
    """
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []


signal_connector = getter(f"{_PL}.Trainer._signal_connector", "what handles signals while a run goes on")
checkpoint_connector = getter(
    f"{_PL}.Trainer._checkpoint_connector", "what loads the checkpoint that a run goes on from"
)


@uses(f"{_PL}.Trainer._signal_connector")
def set_received_sigterm(trainer: Any, received: bool) -> None:
    """Sets what ``trainer.received_sigterm`` gives."""
    trainer._signal_connector.received_sigterm = received


# --- the strategy, its module and optimizers ---

MODULE_ATTRIBUTES = ("_trainer", "_hparams", "_hparams_initial")
"""Attributes in which a LightningModule keeps what Lightning gave it."""
for _name in MODULE_ATTRIBUTES:
    hands_on({f"{_PL}.LightningModule.{_name}": "what is Lightning's among a module's attributes"})
BEFORE_OPTIMIZER_STEP = name_of(
    f"{_PL}.plugins.precision.Precision._after_closure",
    "the method that calls on_before_optimizer_step, with finished gradients, after which an optimizer steps",
)
trainer_of = getter(f"{_PL}.LightningModule._trainer", "the Trainer that a module is attached to, or None")
show_mesh = setter(f"{_PL}.LightningModule._device_mesh", "gives module.device_mesh to configure_model")
compiled_steps = getter(f"{_PL}.LightningModule._compiler_ctx", "how its steps were compiled; or None", None)
layer_sync = getter(f"{_PL}.strategies.ParallelStrategy._layer_sync", "the plugin of sync_batchnorm, or None", None)
forget_optimizers = method(f"{_PL}.strategies.Strategy._reset_optimizers_and_schedulers", "drops an earlier fit's")
detects_anomaly = getter(f"{_PL}.Trainer._detect_anomaly", "whether detect_anomaly was asked for", False)


@uses(f"{_PL}.strategies.Strategy._lightning_module")
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


def set_trainer(module: Any, trainer: Any) -> None:
    """Attaches a module to a trainer, or what stands for one; None detaches it."""
    vars(module)["_trainer"] = trainer


def compile_steps(module: Any, steps: Iterable[str], context: dict[str, Any]) -> None:
    """Compiles the steps of a module as Lightning did, by what :func:`compiled_steps` gave."""
    for step in steps:
        setattr(module, step, context["dynamo_ctx"](getattr(module, step)))
    module._compiler_ctx = context


def sync_batchnorm(strategy: Any) -> None:
    """Applies what ``Trainer(sync_batchnorm=True)`` asks for to the strategy's model."""
    if strategy._layer_sync is not None:
        strategy._layer_sync.apply(strategy.model)


# --- loops ---

SIGTERM_BROADCAST = name_of(f"{_EPOCH}._broadcast_sigterm_tensor", "the method that asks rank 0 whether to end")
BEFORE_FETCH = name_of(f"{_EPOCH}._on_before_fetch", "the method called before each training batch is asked for")
AFTER_FETCH = name_of(f"{_EPOCH}._on_after_fetch", "the method called when it is there, or there is none")
AUTOMATIC_STEP = name_of(
    f"{_PL}.loops.optimization.automatic._AutomaticOptimization._training_step",
    "the method that runs a training step, and refuses None over several processes",
)
running_loop = getter(f"{_PL}.Trainer._active_loop", "the loop of the trainer that runs")
goes_on = getter(f"{_FIT}._loaded_from_state_dict", "whether a fit's progress was restored from a checkpoint")


@uses(f"{_EPOCH}._is_training_done", f"{_EPOCH}._should_check_val_fx", f"{_FIT}._data_fetcher")
@uses(f"{_PL}.trainer.setup._parse_time_interval_seconds")
def is_last(trainer: pl.Trainer) -> bool:
    """Whether the batch that runs is the last of the training, or before a validation, as all ranks know.

    Validations that come after a time (``val_check_interval="00:10:00"``) are none: each rank has its own.
    """
    fit: Any = trainer.fit_loop
    by_the_clock = trainer._val_check_time_interval is not None  # type: ignore[attr-defined]
    validates = not by_the_clock and fit.epoch_loop._should_check_val_fx(fit._data_fetcher)
    return fit.epoch_loop._is_training_done or validates


@uses(f"{_EPOCH}._should_accumulate")
def accumulates(trainer: Any) -> bool:
    """Whether the optimizer does not step after the batch that runs."""
    return bool(trainer.fit_loop.epoch_loop._should_accumulate())


@uses(f"{_PL}.loops.loop._Loop")
def end_restart(fit: Any) -> None:
    """What Lightning leaves out of an epoch that it goes on with is done: none of it had been.

    Where ``max_steps`` alone ends a fit, its own setter takes it for one that restarts whatever it is told (2.6.6).
    """
    _Loop.restarting.fset(fit, False)  # type: ignore[attr-defined]


@uses(f"{_PL}.trainer.call._call_strategy_hook")
def call_training_step(trainer: pl.Trainer, *args: Any) -> Any:
    """Runs the strategy's ``training_step`` as Lightning does, under the profiler."""
    return call._call_strategy_hook(trainer, "training_step", *args)


@uses(f"{_PL}.Trainer._evaluation_loop")
def evaluation_loop(trainer: Any) -> Any:
    """The loop that evaluates or predicts now."""
    return trainer.predict_loop if trainer.predicting else trainer._evaluation_loop


@uses(f"{_EVALUATION}._max_batches", f"{_PREDICTION}._predictions")
def limits_of(loop: Any) -> list[int | float]:
    """How many batches an evaluation or prediction loop takes of each loader."""
    return loop.max_batches if hasattr(loop, "_predictions") else loop._max_batches


@uses(f"{_EVALUATION}._evaluation_step", f"{_PREDICTION}._predict_step")
def batch_method(loop: Any) -> str:
    """The name of the method by which an evaluation or prediction loop runs a batch, hooks and logs included."""
    return "_predict_step" if hasattr(loop, "_predictions") else "_evaluation_step"


@uses(f"{_EVALUATION}._data_fetcher", f"{_PREDICTION}._data_fetcher")
def is_last_evaluated(loop: Any) -> bool:
    """Whether an evaluation or prediction loop has no batch left after the one that ran."""
    return bool(loop._data_fetcher.done)


# --- loaders ---

DATASET_LENGTH = name_of(f"{_COMBINED}._dataset_length", "the method by which a finder knows the largest batch")
PREPARE_LOADER = name_of(
    f"{_CONNECTOR}._DataConnector._prepare_dataloader",
    "the method that makes a loader ready, and would give it a sampler of Lightning's",
)
LOAD_LOADER_STATES = name_of(f"{_FIT}._load_combined_loader_states", "called when loaders are there, not yet asked")
data_connector = getter(f"{_PL}.Trainer._data_connector", "what makes the Trainer's loaders ready")
accelerator_connector = getter(f"{_PL}.Trainer._accelerator_connector", "what knows use_distributed_sampler")
has_loader_states = getter(f"{_FIT}._combined_loader_states_to_load", "those that plain Lightning goes on by; or none")
data_source = getter(f"{_FIT}._data_source", "where a loop asks for its loaders")
mode_of = getter(f"{_COMBINED}._mode", "how combined loaders go together: 'max_size_cycle', 'sequential' and so on")
forget_loaders = setter(f"{_FIT}._combined_loader", "lets a loop ask for its loaders anew")
loaders_of = getter(f"{_FIT}._combined_loader", "the combined loader of a loop, or None before its data is set up")
for _path in (_EVALUATION, _PREDICTION):
    hands_on({f"{_path}._combined_loader": "the combined loader of a loop"})


@uses(f"{_CONNECTOR}._request_dataloader")
def requested_loaders(loop: Any) -> Any:
    """What the user's hook gives to a loop as its loaders, asked for once more."""
    return _request_dataloader(loop._data_source)


def prepared_loader(trainer: pl.Trainer, loader: Any, stage: RunningStage) -> Any:
    """A loader as Lightning hands it to a loop."""
    return trainer._data_connector._prepare_dataloader(loader, shuffle=stage == RunningStage.TRAINING, mode=stage)


@uses(f"{_PL}.LightningModule._on_before_batch_transfer")
def transferred(trainer: pl.Trainer, batch: Any) -> Any:
    """A loader's batch as Lightning gives it to a step: converted, and on the device, by the user's hooks."""
    batch = trainer.lightning_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@uses(f"{_PL}.overrides.distributed._IndexBatchSamplerWrapper._batch_sampler")
def without_index_wrapper(batch_sampler: Any) -> Any:
    """The batch sampler within Lightning's wrapper that notes indices; itself where it is none."""
    return getattr(batch_sampler, "_batch_sampler", batch_sampler)


@uses(f"{_COMBINED}._iterables", f"{_COMBINED}._spec", "torch.utils._pytree.tree_unflatten")
def show_loaders(combined: Any, loaders: list[object]) -> None:
    """Sets what ``trainer.train_dataloader`` and the like give; nothing is iterated by it."""
    combined._iterables = torch.utils._pytree.tree_unflatten(loaders, combined._spec)


@uses(f"{_FIT}._data_fetcher")
def fetches_ahead(fit_loop: Any) -> bool:
    """Whether Lightning fetches one batch ahead, since it can't know by their number which is the last."""
    fetcher = fit_loop._data_fetcher
    return getattr(fetcher, "prefetch_batches", 0) > 0 and fetcher.length is None


def forget_loader_states(fit_loop: Any) -> None:
    """Takes off the loop the states of loaders that plain Lightning would go on by."""
    fit_loop._combined_loader_states_to_load = []


_MONITOR = f"{_PL}.callbacks.throughput_monitor"
compute_dtype = _plugin_to_compute_dtype
hands_on({f"{_MONITOR}._plugin_to_compute_dtype": "the dtype in which a precision plugin has most computed"})
_throughputs = getter(f"{_MONITOR}.ThroughputMonitor._throughputs", "what a monitor measures, by stage")


def throughputs_of(monitor: Any) -> list[Any]:
    """What a ``ThroughputMonitor`` has begun to measure."""
    return list(_throughputs(monitor).values())


is_of_tuner = getter(f"{_PL}.callbacks.LearningRateFinder._early_exit", "whether a Tuner made it, which ends the run")
hands_on({f"{_PL}.callbacks.BatchSizeFinder._early_exit": "whether a Tuner made the finder"})


def dump_checkpoint(trainer: Any) -> dict[str, Any]:
    """All that Lightning puts into a checkpoint, hooks of the user's called."""
    checkpoint: dict[str, Any] = checkpoint_connector(trainer).dump_checkpoint(weights_only=False)
    return checkpoint


last_checkpoints = method(
    f"{_PL}.callbacks.ModelCheckpoint._find_last_checkpoints", "the files to choose from for ckpt_path='last'"
)

_CHECKPOINTS = f"{_PL}.callbacks.ModelCheckpoint"
SAVE_LAST = name_of(f"{_CHECKPOINTS}._save_last_checkpoint", "the method by which a callback saves the last checkpoint")
SAVE_METHODS = (
    name_of(f"{_CHECKPOINTS}._save_topk_checkpoint", "the method by which a callback saves one of the best, or each"),
    SAVE_LAST,
)
monitor_candidates = method(f"{_CHECKPOINTS}._monitor_candidates", "the values by which a callback names its files")

_KEPT = ("current_score", "best_k_models", "kth_best_model_path", "kth_value", "best_model_score", "best_model_path")
_SAVED = ("last_model_path", "_last_checkpoint_saved", "_last_global_step_saved")


@uses(f"{_CHECKPOINTS}._last_checkpoint_saved", f"{_CHECKPOINTS}._last_global_step_saved")
def kept_files(callback: Any) -> dict[str, Any]:
    """What a checkpoint callback knows of the files that it keeps; see :func:`set_kept_files`."""
    known = {name: vars(callback)[name] for name in (*_KEPT, *_SAVED) if name in vars(callback)}
    return {**known, "best_k_models": dict(callback.best_k_models)}


def set_kept_files(callback: Any, known: dict[str, Any]) -> None:
    """Puts back what :func:`kept_files` gave."""
    vars(callback).update(known)
