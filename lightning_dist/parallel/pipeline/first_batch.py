"""The first batch of a run, taken before it begins and without a trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from lightning_dist.compat.lightning import data_source, mode_of, prepared_loader, requested_loaders
from lightning_dist.pytree import tree_map


def first_batch(trainer: pl.Trainer) -> Any:
    """As the first step of the run will get it, but for what hooks before it change."""
    fn = trainer.state.fn
    loops: dict[Any, tuple[Any, RunningStage]] = {
        TrainerFn.FITTING: (trainer.fit_loop, RunningStage.TRAINING),
        TrainerFn.VALIDATING: (trainer.validate_loop, RunningStage.VALIDATING),
        TrainerFn.TESTING: (trainer.test_loop, RunningStage.TESTING),
        TrainerFn.PREDICTING: (trainer.predict_loop, RunningStage.PREDICTING),
    }
    loop, stage = loops[fn]
    loaders: Any = requested_loaders(loop)
    if not isinstance(loaders, CombinedLoader):
        loaders = CombinedLoader(loaders, "max_size_cycle" if fn == TrainerFn.FITTING else "sequential")
    firsts, taken = [], {}
    for loader in loaders.flattened:
        if isinstance(loader, Iterator):  # what is taken of it is gone: the loop gets it first
            firsts.append(next(loader))
            taken[id(loader)] = chain([firsts[-1]], loader)
        else:
            firsts.append(_first_of(prepared_loader(trainer, loader, stage)))
    if taken:
        given = data_source(loop)
        given.instance = tree_map(
            lambda one: taken.get(id(one), one), given.instance, is_leaf=lambda v: not _is_container(v)
        )
    if mode_of(loaders) == "sequential":
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
