"""Cutting a module before it is divided, sharded or given optimizers: on a first batch of its own loader."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from lightning_dist.compat.torch import has_gradient_hooks
from lightning_dist.parallel.pipeline.fake_module import FakeModule
from lightning_dist.parallel.pipeline.first_batch import first_batch
from lightning_dist.parallel.pipeline.schedule import PipelineOptions
from lightning_dist.parallel.pipeline.stage_search import find_stages
from lightning_dist.parallel.pipeline.stages import PartitionedModule, Stages, hide_parameters
from lightning_dist.parallel.pipeline.trace import Trace
from lightning_dist.parallel.pipeline.tracing import refuse_manual, trace_step
from lightning_dist.patches import Patches
from lightning_dist.random_states import kept_random_states

_STEPS = {
    TrainerFn.FITTING: ("training_step", "train_step_context"),
    TrainerFn.VALIDATING: ("validation_step", "val_step_context"),
    TrainerFn.TESTING: ("test_step", "test_step_context"),
    TrainerFn.PREDICTING: ("predict_step", "predict_step_context"),
}
"""The step of a run, and the precision plugin's context around it."""


_PARTITION = "lightning_dist_partition"
"""Attribute of a module that has been cut, as long as it is."""


def partition_of(module: nn.Module) -> PartitionedModule | None:
    """What a module has been cut into; None for a whole one."""
    return vars(module).get(_PARTITION)


def partition_module(
    module: pl.LightningModule,
    trainer: pl.Trainer,
    options: PipelineOptions,
    group: dist.ProcessGroup,
    blocks: list[str],
    undivided: list[str],
    keep_whole: bool,
    device: torch.device,
    dtype: torch.dtype | None,
    patches: Patches,
) -> PartitionedModule:
    """Cuts a module, in place: what other ranks hold becomes placeholders. One that has been cut stays.

    The batch is the first of the loader of the run that begins, made once more and in this process; random states are
    left as they were. :func:`whole_of_all_stages` gives what a rank lacks, and ``patches`` takes off the rest.

    Args:
        module: whole and equal on every rank, or on meta but for its buffers.
        trainer: about to run.
        blocks: names of the repeated parts.
        undivided: names of the parts of which a rank holds all or nothing, since the tensor axis divides them.
        keep_whole: never cut inside of a block.
        dtype: in which parameters are computed that autocast would cast, where it is not their own.

    Raises:
        ValueError: it can't be cut so, or was cut for another layout.

    Communication: the first rank's choice is broadcast over the world, as an object of a few kB.
    """
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    there = partition_of(module)
    if there is not None:
        there.validate_same(rank, num_ranks)
        return there.run_by(options)
    _validate_no_gradient_hooks(module)
    fake_module = FakeModule(module, device, dtype)
    trace = _trace_first_step(fake_module, module, trainer, options, num_ranks, device)
    stages = find_stages(module, trace, options, num_ranks, blocks, keep_whole, undivided, fake_module.is_trained)
    box: list[Any] = [stages]
    dist.broadcast_object_list(box, 0, device=device)
    partitioned = PartitionedModule(fake_module, box[0], rank)
    hide_parameters(module, partitioned.stages.placeholders(module, rank), device)
    patches.also(partial(setattr, module, "example_input_array", module.example_input_array))
    module.example_input_array = None  # on which summaries and loggers would run the whole network
    patches.set(module, _PARTITION, partitioned)
    return partitioned


def _validate_no_gradient_hooks(module: nn.Module) -> None:
    hooked = next((name for name, p in module.named_parameters() if has_gradient_hooks(p)), None)
    if hooked is not None:
        raise ValueError(
            f"pp: the parameter {hooked} has hooks on its gradient, which would see that of each microbatch; change "
            "gradients in on_after_backward or on_before_optimizer_step"
        )


def _trace_first_step(
    fake_module: FakeModule,
    module: pl.LightningModule,
    trainer: pl.Trainer,
    options: PipelineOptions,
    num_ranks: int,
    device: torch.device,
) -> Trace:
    """The trace of the first step of the run, as Lightning will run it, on a microbatch of its first batch."""
    assert trainer.state.fn is not None
    step, context = _STEPS[trainer.state.fn]
    with kept_random_states(device):
        batch = first_batch(trainer)
        part = _first_part(batch, options, num_ranks)
        was_training = module.training
        module.train(step == "training_step")
        try:
            with getattr(trainer.precision_plugin, context)():
                trace = _traced_early(fake_module, module, step, part, batch)
        finally:
            module.train(was_training)
    if step == "training_step":
        refuse_manual(module, fake_module, trace)
    return trace


def plan_stages(
    module: pl.LightningModule,
    options: PipelineOptions,
    num_ranks: int,
    blocks: list[str],
    keep_whole: bool,
    batch: Any = None,
) -> Stages:
    """The stages that a module would be cut into, without cutting it.

    Args:
        module: whole; on any device, or on meta but for its buffers.
        num_ranks: of the pipeline.
        blocks: names of the repeated parts.
        keep_whole: never cut inside of a block.
        batch: for its training step; None to run its forward on ``example_input_array``.

    Raises:
        ValueError: it can't be cut so, or there is nothing to run it on.
    """
    device = torch.device("cpu")
    rest: tuple[Any, ...]
    if batch is not None:
        step, rest = "training_step", _index_of(module, "training_step")
        part = _first_part(batch, options, num_ranks)
    else:
        example: Any = module.example_input_array
        if example is None:
            raise ValueError(
                "pp is explained by running the network on a batch, and there is none; give the module an "
                "example_input_array, or explain a recipe, which has data"
            )
        step = "forward"
        part, *others = example if isinstance(example, tuple) else (example,)
        rest = tuple(others)
    with kept_random_states(device):
        trace = trace_step(FakeModule(module, device), module, step, part, rest)
    return find_stages(module, trace, options, num_ranks, blocks, keep_whole)


def _traced(fake_module: FakeModule, module: pl.LightningModule, step: str, part: Any, batch: Any) -> Trace:
    """The trace of a microbatch.

    Raises:
        ValueError: the step runs on a whole batch, and not on a microbatch of it.
    """
    rest = _index_of(module, step)
    try:
        return trace_step(fake_module, module, step, part, rest)
    except Exception as error:
        try:
            trace_step(fake_module, module, step, batch, rest)
        except Exception:
            raise error from None
        raise ValueError(
            f"pp: {step} runs on a batch, and not on a microbatch of it ({type(error).__name__}: {error}), so the "
            "batch is not split as the step needs it: say with batch_split= how it is, or use num_microbatches=1, "
            "or another axis"
        ) from error


def _traced_early(fake_module: FakeModule, module: pl.LightningModule, step: str, part: Any, batch: Any) -> Trace:
    """The trace of a step before any hook of the fit has run; hooks that make what it needs run on the fake module.

    Raises:
        ValueError: the step needs what only other code makes.
    """
    try:
        return _traced(fake_module, module, step, part, batch)
    except AttributeError:
        fake_module.follow(module)
    try:
        for hook in _HOOKS_BEFORE:
            getattr(fake_module.module, hook)()
        with contextlib.suppress(TypeError):  # of a hook without the batch's index
            fake_module.module.on_train_batch_start(part, 0)  # type: ignore[operator]
        return _traced(fake_module, module, step, part, batch)
    except AttributeError as error:
        raise ValueError(
            f"pp runs a step once to see where it can be cut, before hooks such as on_fit_start: {error}; make what "
            "the step needs in __init__, setup or configure_model"
        ) from error


_HOOKS_BEFORE = ("on_fit_start", "on_train_start", "on_train_epoch_start")
"""Hooks of a LightningModule between its set-up and the first step."""


def _first_part(batch: Any, options: PipelineOptions, num_ranks: int) -> Any:
    splitter = options.splitter
    return splitter.split(batch, options.microbatches(splitter.size(batch), num_ranks) or 1)[0][0]


def _index_of(module: pl.LightningModule, step: str) -> tuple[int, ...]:
    """The step's arguments beside the batch: its index, where it takes one."""
    return (0,) if is_param_in_hook_signature(getattr(module, step), "batch_idx", min_args=2) else ()
