"""Cutting a module before it is divided, sharded or given optimizers: on a first batch of its own loader."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_dist.collectives import broadcast_object
from lightning_dist.compat.lightning import data_source, mode_of, prepared_loader, requested_loaders, transferred
from lightning_dist.compat.torch import has_gradient_hooks
from lightning_dist.parallel.pipeline.fake_module import FakeModule
from lightning_dist.parallel.pipeline.schedule import PipelineOptions
from lightning_dist.parallel.pipeline.stage_search import find_stages
from lightning_dist.parallel.pipeline.stages import PartitionedModule, Stages, hide_parameters
from lightning_dist.parallel.pipeline.trace import Trace
from lightning_dist.parallel.pipeline.tracing import refuse_manual, trace_step
from lightning_dist.patches import Patches
from lightning_dist.pytree import tree_map
from lightning_dist.random_states import kept_random_states

_STEPS = {
    TrainerFn.FITTING: ("training_step", "train_step_context", "fit_loop", RunningStage.TRAINING),
    TrainerFn.VALIDATING: ("validation_step", "val_step_context", "validate_loop", RunningStage.VALIDATING),
    TrainerFn.TESTING: ("test_step", "test_step_context", "test_loop", RunningStage.TESTING),
    TrainerFn.PREDICTING: ("predict_step", "predict_step_context", "predict_loop", RunningStage.PREDICTING),
}
"""The step of a run, the precision plugin's context around it, and its loop."""

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
        blocks: names of the repeated parts.
        undivided: names of the parts of which a rank holds all or nothing, since the tensor axis divides them.
        keep_whole: never cut inside of a block.
        dtype: in which parameters are computed that autocast would cast, where it is not their own.

    Communication: the first rank's choice is broadcast over the world, as an object of a few kB.

    Raises:
        ValueError: it can't be cut so, or was cut for another layout.
    """
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    there = partition_of(module)
    if there is not None:
        there.validate_same(rank, num_ranks)
        return there.run_by(options)
    if hooked := [name for name, parameter in module.named_parameters() if has_gradient_hooks(parameter)]:
        raise ValueError(
            f"pp: the parameter {hooked[0]} has hooks on its gradient, which would see that of each microbatch; change "
            "gradients in on_after_backward or on_before_optimizer_step"
        )
    fake_module = FakeModule(module, device, dtype)
    trace = _trace_first_step(fake_module, module, trainer, options, num_ranks, device)
    stages = find_stages(module, trace, options, num_ranks, blocks, keep_whole, undivided, fake_module.is_trained)
    stages = broadcast_object(stages)
    partitioned = PartitionedModule(fake_module, stages, rank)
    hide_parameters(module, stages.placeholders(module, rank), device)
    patches.also(partial(setattr, module, "example_input_array", module.example_input_array))
    module.example_input_array = None  # on which summaries and loggers would run the whole network
    patches.set(module, _PARTITION, partitioned)
    return partitioned


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
    step, context, *_ = _STEPS[trainer.state.fn]
    with kept_random_states(device):
        batch = _first_batch(trainer)
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
    """The trace of a microbatch; raises a ValueError where the step runs on a whole batch, and not on a microbatch."""
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
    Raises a ValueError where the step needs what only other code makes.
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


def _first_batch(trainer: pl.Trainer) -> Any:
    """As the first step of the run will get it, but for what ``on_train_batch_start`` and the like change."""
    assert trainer.state.fn is not None
    _, _, loop_name, stage = _STEPS[trainer.state.fn]
    loop = getattr(trainer, loop_name)
    loaders: Any = requested_loaders(loop)
    if not isinstance(loaders, CombinedLoader):
        is_fit = stage is RunningStage.TRAINING
        loaders = CombinedLoader(loaders, "max_size_cycle" if is_fit else "sequential")
    firsts, taken = [], {}
    for loader in loaders.flattened:
        if isinstance(loader, Iterator):  # what is taken of it is gone: the loop gets it first
            firsts.append(next(loader))
            taken[id(loader)] = chain([firsts[-1]], loader)
        else:
            firsts.append(_first_of(prepared_loader(trainer, loader, stage)))
    if taken:
        given = data_source(loop)
        given.instance = tree_map(lambda one: taken.get(id(one), one), given.instance, is_leaf=_is_loader)
    numbered = iter(firsts)
    is_sequential = mode_of(loaders) == "sequential"
    batch = firsts[0] if is_sequential else tree_map(lambda _: next(numbered), loaders.iterables, is_leaf=_is_loader)
    return transferred(trainer, batch)


def _is_loader(value: Any) -> bool:
    return type(value) not in (list, tuple, dict)


def _first_of(loader: Any) -> Any:
    """The first batch of a loader, without its workers. Generators and states of samplers and data sets stay."""
    if not isinstance(loader, DataLoader):
        with _as_it_was(loader):
            return next(iter(loader))
    dataset: Any = loader.dataset
    with _as_it_was(loader, loader.batch_sampler, loader.sampler, dataset):
        if isinstance(dataset, IterableDataset):
            rows = iter(dataset)
            samples: Any = next(rows) if loader.batch_size is None else list(islice(rows, loader.batch_size))
        elif loader.batch_sampler is not None:
            indices = next(iter(loader.batch_sampler))
            many = getattr(dataset, "__getitems__", None)
            samples = many(indices) if many is not None else [dataset[index] for index in indices]
        else:
            samples = dataset[next(iter(loader.sampler))]
        return loader.collate_fn(samples)


@contextmanager
def _as_it_was(*owners: Any) -> Iterator[None]:
    """Gives the objects, and the samplers inside of them, the states of their own that they had before."""
    todo, seen = [owner for owner in owners if owner is not None], set()
    with Patches() as patches:
        while todo:
            owner = todo.pop()
            if id(owner) in seen:
                continue
            seen.add(id(owner))
            if isinstance(owner, torch.Generator):
                patches.also(partial(owner.set_state, owner.get_state()))
                continue
            if hasattr(owner, "state_dict") and hasattr(owner, "load_state_dict"):
                patches.also(partial(owner.load_state_dict, copy.deepcopy(owner.state_dict())))
            if isinstance(owner, (torch.utils.data.Sampler, torch.utils.data.Dataset)):
                plain = {k: v for k, v in vars(owner).items() if isinstance(v, (int, float, str, bool, type(None)))}
                patches.also(partial(vars(owner).update, plain))
            kinds = (torch.Generator, torch.utils.data.Sampler)
            todo += [value for value in getattr(owner, "__dict__", {}).values() if isinstance(value, kinds)]
        yield
