"""Lightning's hooks of a strategy that deal loaders to the data ranks, and count what was dealt."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import RunningStage
from torch.utils._pytree import tree_unflatten  # as Lightning's CombinedLoader does; no public name in torch 2.14
from torch.utils.data import DataLoader

from lightning_dist.data import (
    DistributedBatches,
    DistributedStream,
    distributed_batches,
    is_stream,
    seed_loader,
    shard_loader,
    shard_stream,
    share_generator,
)
from lightning_dist.processes import LayoutRanks


class LoaderHooks(LayoutRanks):
    """The part of a strategy that knows loaders."""

    _prepared: WeakKeyDictionary[object, object]
    """Loaders as Lightning prepared them, by what is iterated in their place."""
    _num_evaluated = 0
    """Batches of an evaluation so far, for steps that are not told."""

    def _own_dataloaders(self, trainer: pl.Trainer) -> None:
        self._prepared = WeakKeyDictionary()
        connector: Any = trainer._data_connector
        if "_prepare_dataloader" not in vars(connector):
            connector._prepare_dataloader = partial(self._prepare_dataloader, connector._prepare_dataloader)
            fitting = trainer.fit_loop.epoch_loop.val_loop
            for loop in (fitting, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
                vars(loop)["setup_data"] = partial(self._set_up_evaluation, loop, loop.setup_data)

    def _prepare_dataloader(
        self, original: Callable[..., object], dataloader: object, shuffle: bool, mode: RunningStage
    ) -> object:
        """Stands before Lightning's method of this name, which would make a sampler of its own (seen in 2.6.6)."""
        assert self.lightning_module is not None
        connector = self.lightning_module.trainer._accelerator_connector
        wanted, connector.use_distributed_sampler = connector.use_distributed_sampler, False
        try:
            dataloader = original(dataloader, shuffle=shuffle, mode=mode)
        finally:
            connector.use_distributed_sampler = wanted
        prepared = dataloader
        if wanted and is_stream(dataloader):
            dataloader = self._deal_stream(dataloader, mode)
        elif wanted and isinstance(dataloader, DataLoader):
            dataloader = shard_loader(dataloader, self.num_data_ranks, self.data_rank, mode)
            share_generator(dataloader)
        if isinstance(dataloader, DataLoader):
            seed_loader(dataloader, self.data_rank)
        if self.num_data_ranks == 1 and dataloader is not prepared:
            self._prepared[dataloader] = prepared
            if isinstance(prepared, DataLoader) and isinstance(dataloader, DataLoader):
                prepared.worker_init_fn = dataloader.worker_init_fn  # as plain Lightning does
        return dataloader

    def _show(self, combined: Any, loaders: Iterable[object]) -> None:
        """Makes ``trainer.train_dataloader`` and the like give what they give in plain Lightning: for one data rank the
        user's own loaders, not those that deal them (private; seen in Lightning 2.6.6: nothing is iterated by it).
        """
        own = [self._shown(loader) for loader in loaders]
        combined._iterables = tree_unflatten(own, combined._spec)

    def _shown(self, loader: Any) -> Any:
        return self._prepared.get(loader, loader) if isinstance(loader, (DataLoader, DistributedStream)) else loader

    def _deal_stream(self, loader: object, mode: RunningStage) -> object:
        if self.layout is None and self.world_size > 1:
            raise ValueError(
                'the training loader is asked for before layout="auto" has been decided, and its samples come in a '
                "stream, which is dealt by the layout; name the layout, or ask for it (estimated_stepping_batches) in "
                "configure_optimizers or later"
            )
        if self.data_group is None or self.num_data_ranks == 1:
            return loader
        dealt = shard_stream(
            loader, self.num_data_ranks, self.data_rank, self.data_group, mode == RunningStage.TRAINING
        )
        if isinstance(dealt, DistributedStream) and isinstance(loader, DataLoader):
            seed_loader(loader, data_rank=0)  # every rank reads the same stream
            share_generator(loader)
        return dealt

    def _set_up_evaluation(self, loop: Any, original: Callable[[], None]) -> None:
        """Stands before the method ``setup_data`` of an evaluation loop, which says how many batches it takes at most.

        They are those of one process, which the ranks take together (seen in 2.6.6).
        """
        original()
        combined = loop._combined_loader
        if combined is None:
            return
        limits = loop.max_batches if hasattr(loop, "_predictions") else loop._max_batches
        for index, loader in enumerate(combined.flattened):
            dealt = loader if isinstance(loader, DistributedStream) else distributed_batches(loader)
            if dealt is not None:
                limits[index] = dealt.limit(limits[index])
        self._show(combined, combined.flattened)

    def _batch_index(self, args: tuple[Any, ...]) -> tuple[int, ...]:
        """Index of the batch, and of its loader; a step that takes no index is counted here."""
        self._num_evaluated += 1
        return args[1:3] if len(args) > 1 else (self._num_evaluated - 1,)

    def _dealt(self, dataloader_idx: int) -> DistributedBatches | DistributedStream | None:
        """The batches of an evaluation loader that are this rank's; None where the user deals them."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        loop = trainer.predict_loop if trainer.predicting else trainer._evaluation_loop
        combined = loop._combined_loader
        loaders = combined.flattened if combined is not None else []
        if combined is None or dataloader_idx >= len(loaders):
            return None
        dealt = [loader if isinstance(loader, DistributedStream) else distributed_batches(loader) for loader in loaders]
        if combined._mode == "sequential":
            return dealt[dataloader_idx]
        # a batch of all loaders is this rank's own for as long as that of the longest is
        parts = [part for part in dealt if part is not None]
        return max(parts, key=lambda part: part.total) if len(parts) == len(dealt) else None

    def _counts(self, batch_idx: int, dataloader_idx: int = 0) -> bool:
        """Whether this evaluation batch is this rank's own, not one that it repeats to run along."""
        dealt = self._dealt(dataloader_idx)
        return dealt is None or dealt.counts(batch_idx)

    def _drop_prediction(self, batch_idx: int, dataloader_idx: int = 0) -> None:
        """A repeated batch is the last of its loader: the loop ends there, or goes on to the next with None."""
        assert self.lightning_module is not None
        loop = self.lightning_module.trainer.predict_loop
        if loop.epoch_batch_indices[dataloader_idx]:
            loop.epoch_batch_indices[dataloader_idx].pop()
        if dataloader_idx == loop.num_dataloaders - 1:
            raise StopIteration
