"""Cutting a module before it is divided, sharded or given optimizers: on a first batch of its own loader."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.utils.data import DataLoader, IterableDataset

from lightning_dist.parallel.pipeline.by_hand import SEVERAL
from lightning_dist.parallel.pipeline.skeleton import Skeleton
from lightning_dist.parallel.pipeline.stages import Cut, PipelineOptions, Stages, find_stages, hide_parameters
from lightning_dist.parallel.pipeline.trace import Trace, trace_step
from lightning_dist.pytree import tree_map
from lightning_dist.random_states import kept_random_states

STEP_OF = {
    TrainerFn.FITTING: "training_step",
    TrainerFn.VALIDATING: "validation_step",
    TrainerFn.TESTING: "test_step",
    TrainerFn.PREDICTING: "predict_step",
}


_CUT = "_pipeline_cut"
"""Attribute of a module that has been cut. A table beside the modules would keep them alive: a cut refers to them."""


def cut_of(module: pl.LightningModule) -> Cut | None:
    """What a module has been cut into; None for a whole one."""
    return vars(module).get(_CUT)


def cut_module(
    module: pl.LightningModule,
    trainer: pl.Trainer,
    options: PipelineOptions,
    group: dist.ProcessGroup,
    blocks: list[str],
    together: list[str],
    keep_whole: bool,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Cut:
    """Cuts a module, in place: what other ranks hold becomes placeholders. One that has been cut stays.

    The batch is the first of the loader of the run that begins, made once more and in this process; random states are
    left as they were.

    Args:
        module: whole and equal on every rank, or on meta but for its buffers.
        trainer: about to run.
        options: the user's.
        group: the ranks of the pipeline.
        blocks: names of the repeated parts.
        together: names of the parts that the tensor axis divides, each of which a rank holds whole or not at all.
        keep_whole: never cut inside of a block.
        device: of this rank.
        dtype: in which parameters are computed that autocast would cast, where it is not their own.

    Raises:
        ValueError: it can't be cut so, or was cut for another layout.

    Communication: the first rank's choice is broadcast over the world, as an object of a few kB.
    """
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    there = cut_of(module)
    if there is not None:
        there.refuse_other(rank, num_ranks)
        return there.run_by(options)
    assert trainer.state.fn is not None
    step = STEP_OF[trainer.state.fn]
    hooked = next((n for n, p in module.named_parameters() if p._backward_hooks or _accumulates(p)), None)
    if hooked is not None:
        raise ValueError(
            f"pp: the parameter {hooked} has hooks on its gradient, which would see that of each microbatch; change "
            "gradients in on_after_backward or on_before_optimizer_step"
        )
    skeleton = Skeleton(module, device, dtype)
    with kept_random_states(device):
        batch = _first_batch(trainer)
        part = _first_part(batch, options, num_ranks)
        was_training = module.training
        module.train(step == "training_step")
        try:
            context = {
                "training_step": trainer.precision_plugin.train_step_context,
                "validation_step": trainer.precision_plugin.val_step_context,
                "test_step": trainer.precision_plugin.test_step_context,
                "predict_step": trainer.precision_plugin.predict_step_context,
            }[step]
            rest = (0,) if _takes_index(module, step) else ()
            with context():
                trace = _traced_early(skeleton, module, step, part, batch, rest)
        finally:
            module.train(was_training)
    if step == "training_step":
        refuse_manual(module, skeleton, trace)
    stages = find_stages(module, trace, options, num_ranks, blocks, keep_whole, together, skeleton.is_trained)
    box: list[Any] = [stages]
    dist.broadcast_object_list(box, 0, device=device)
    cut = Cut(skeleton, box[0], rank)
    hide_parameters(module, cut.stages.placeholders(module, rank), device)
    module.example_input_array = None  # on which summaries and loggers would run the whole network
    vars(module)[_CUT] = cut
    return cut


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
        options: the user's.
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
        step, rest = "training_step", (0,) if _takes_index(module, "training_step") else ()
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
        trace = trace_step(Skeleton(module, device), module, step, part, rest)
    return find_stages(module, trace, options, num_ranks, blocks, keep_whole)


def _traced(
    skeleton: Skeleton, module: pl.LightningModule, step: str, part: Any, batch: Any, rest: tuple[Any, ...]
) -> Trace:
    """The trace of a microbatch.

    Raises:
        ValueError: the step runs on a whole batch, and not on a microbatch of it.
    """
    try:
        return trace_step(skeleton, module, step, part, rest)
    except Exception as error:
        try:
            trace_step(skeleton, module, step, batch, rest)
        except Exception:
            raise error from None
        raise ValueError(
            f"pp: {step} runs on a batch, and not on a microbatch of it ({type(error).__name__}: {error}), so the "
            "batch is not split as the step needs it: say with batch_split= how it is, or use num_microbatches=1, "
            "or another axis"
        ) from error


def _traced_early(
    skeleton: Skeleton, module: pl.LightningModule, step: str, part: Any, batch: Any, rest: tuple[Any, ...]
) -> Trace:
    """The trace of a step before any hook of the fit has run; hooks that make what it needs run on the skeleton.

    Raises:
        ValueError: the step needs what only other code makes.
    """
    try:
        return _traced(skeleton, module, step, part, batch, rest)
    except AttributeError:
        skeleton.follow(module)
    try:
        for hook in _HOOKS_BEFORE:
            getattr(skeleton.module, hook)()
        with contextlib.suppress(TypeError):  # of a hook without the batch's index
            skeleton.module.on_train_batch_start(part, 0)  # type: ignore[operator]
        return _traced(skeleton, module, step, part, batch, rest)
    except AttributeError as error:
        raise ValueError(
            f"pp runs a step once to see where it can be cut, before hooks such as on_fit_start: {error}; make what "
            "the step needs in __init__, setup or configure_model"
        ) from error


_HOOKS_BEFORE = ("on_fit_start", "on_train_start", "on_train_epoch_start")
"""Of a LightningModule, between its set-up and the first step."""


def refuse_manual(module: pl.LightningModule, skeleton: Skeleton, trace: Trace) -> None:
    """Raises where a step that optimises by hand can't be run over microbatches.

    Args:
        module: whose step it is.
        skeleton: that ran it last.
        trace: of that.

    Raises:
        ValueError: there is not one loss, or the step asks for its value.
    """
    if module.automatic_optimization:
        return
    if trace.open_end:
        raise ValueError(
            f"pp: a training_step that optimises manually, and asks for the value of a tensor ({trace.open_end}), "
            "which is on the last stage only; leave .item() out (self.log takes tensors), or use another axis"
        )
    if skeleton.backwards != 1:
        raise ValueError(SEVERAL.format(number=skeleton.backwards))


def _accumulates(parameter: Any) -> bool:
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def _first_part(batch: Any, options: PipelineOptions, num_ranks: int) -> Any:
    splitter = options.splitter
    return splitter.split(batch, options.microbatches(splitter.size(batch), num_ranks) or 1)[0][0]


def _takes_index(module: pl.LightningModule, step: str) -> bool:
    return is_param_in_hook_signature(getattr(module, step), "batch_idx", min_args=2)


def _first_batch(trainer: pl.Trainer) -> Any:
    """As the first step of the run will get it, but for what hooks before it change."""
    fn = trainer.state.fn
    loops: dict[Any, tuple[Any, RunningStage]] = {
        TrainerFn.FITTING: (trainer.fit_loop, RunningStage.TRAINING),
        TrainerFn.VALIDATING: (trainer.validate_loop, RunningStage.VALIDATING),
        TrainerFn.TESTING: (trainer.test_loop, RunningStage.TESTING),
        TrainerFn.PREDICTING: (trainer.predict_loop, RunningStage.PREDICTING),
    }
    loop, stage = loops[fn]
    loaders: Any = _request_dataloader(loop._data_source)
    if not isinstance(loaders, CombinedLoader):
        loaders = CombinedLoader(loaders, "max_size_cycle" if fn == TrainerFn.FITTING else "sequential")
    prepare: Any = trainer._data_connector._prepare_dataloader
    firsts, taken = [], {}
    for loader in loaders.flattened:
        if isinstance(loader, Iterator):  # what is taken of it is gone: the loop gets it first
            firsts.append(next(loader))
            taken[id(loader)] = chain([firsts[-1]], loader)
        else:
            firsts.append(_first_of(prepare(loader, shuffle=stage == RunningStage.TRAINING, mode=stage)))
    if taken:
        given: Any = loop._data_source
        given.instance = tree_map(
            lambda one: taken.get(id(one), one), given.instance, is_leaf=lambda v: not _is_container(v)
        )
    if loaders._mode == "sequential":
        batch = firsts[0]
    else:
        numbered = iter(firsts)
        batch = tree_map(lambda _: next(numbered), loaders.iterables, is_leaf=lambda v: not _is_container(v))
    return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)


def _is_container(value: Any) -> bool:
    return type(value) in (list, tuple, dict)


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
    generators: dict[int, tuple[torch.Generator, Any]] = {}
    states: list[tuple[Any, Any]] = []
    attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
    todo, seen = [owner for owner in owners if owner is not None], set()
    while todo:
        owner = todo.pop()
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        if isinstance(owner, torch.Generator):
            generators[id(owner)] = owner, owner.get_state()
            continue
        if hasattr(owner, "state_dict") and hasattr(owner, "load_state_dict"):
            states.append((owner, copy.deepcopy(owner.state_dict())))
        if isinstance(owner, (torch.utils.data.Sampler, torch.utils.data.Dataset)):
            own = vars(owner)
            attributes.append(
                (own, {k: v for k, v in own.items() if isinstance(v, (int, float, str, bool, type(None)))})
            )
        kinds = (torch.Generator, torch.utils.data.Sampler)
        todo += [value for value in getattr(owner, "__dict__", {}).values() if isinstance(value, kinds)]
    try:
        yield
    finally:
        for generator, state in generators.values():
            generator.set_state(state)
        for own, before in attributes:
            own.update(before)
        for owner, state in states:
            owner.load_state_dict(state)
