"""The loaders of a Trainer's loops: each data rank gets its part, and evaluation counts each sample once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader

from lightning_dist import data
from lightning_dist.compat import lightning as private
from lightning_dist.data import DistributedBatches, DistributedStream, seed_loader, share_generator
from lightning_dist.data.streaming_libraries import StreamingLibraries
from lightning_dist.patches import Patches
from lightning_dist.ranks import LayoutRanks
from lightning_dist.trainer.global_batch import GlobalBatch


class Loaders:
    """Shards the loaders of a run over the data ranks, and knows whose each batch of an evaluation is."""

    def __init__(self, ranks: LayoutRanks, batch: GlobalBatch) -> None:
        self._ranks, self._batch = ranks, batch
        self._trainer: Any = None
        self._libraries: StreamingLibraries | None = None
        self._prepared = WeakKeyDictionary[object, object]()
        """Loaders as Lightning prepared them, by what is iterated in their place."""
        self._num_evaluated = 0
        """Batches of an evaluation so far, for steps that are not told."""

    def attach(self, trainer: pl.Trainer, patches: Patches) -> None:
        """From here on the Trainer's loaders are sharded."""
        self._trainer, self._prepared = trainer, WeakKeyDictionary()
        self._libraries = StreamingLibraries(patches)
        patches.wrap(private.data_connector(trainer), private.PREPARE_LOADER, self._prepare)
        fitting = trainer.fit_loop.epoch_loop.val_loop
        for loop in (fitting, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            patches.wrap(loop, "setup_data", partial(self._set_up_evaluation, loop))
            if self._ranks.world_size > 1:
                # Evaluation runs without gradients, but not in inference mode: what fully_shard gathers into would be
                # inference tensors, which a later fit can't write to (Lightning's own FSDPStrategy does so, 2.6.6).
                patches.set(loop, "inference_mode", False)

    def begin_evaluation(self) -> None:
        """The next batch of an evaluation is its first."""
        self._num_evaluated = 0

    def _prepare(
        self, original: Callable[..., object], dataloader: object, shuffle: bool, mode: RunningStage
    ) -> object:
        """Wraps Lightning's method that makes a loader ready, which would give it a sampler of its own."""
        connector = private.accelerator_connector(self._trainer)
        wanted, connector.use_distributed_sampler = connector.use_distributed_sampler, False
        try:
            dataloader = original(dataloader, shuffle=shuffle, mode=mode)
        finally:
            connector.use_distributed_sampler = wanted
        prepared, ranks = dataloader, self._ranks
        libraries = self._libraries if wanted and data.is_stream(dataloader) and self._knows_data_ranks else None
        if libraries is not None:
            libraries.tell(dataloader, ranks.num_data_ranks, ranks.data_rank)
        if wanted and data.is_stream(dataloader):
            dataloader = self._shard_stream(dataloader, mode)
        elif wanted and isinstance(dataloader, DataLoader):
            divide = self._batch.divided
            dataloader = data.shard_loader(dataloader, ranks.num_data_ranks, ranks.data_rank, mode, divide)
            share_generator(dataloader)
        if isinstance(dataloader, DataLoader):
            seed_loader(dataloader, ranks.data_rank)
        if libraries is not None:
            libraries.tell_workers(prepared, ranks.num_data_ranks, ranks.data_rank)
        if mode == RunningStage.TRAINING:
            self._batch.take(dataloader)
        if ranks.num_data_ranks == 1 and dataloader is not prepared:
            self._prepared[dataloader] = prepared
            if isinstance(prepared, DataLoader) and isinstance(dataloader, DataLoader):
                prepared.worker_init_fn = dataloader.worker_init_fn  # as plain Lightning does
        return dataloader

    def show(self, combined: Any, loaders: Iterable[object]) -> None:
        """Makes ``trainer.train_dataloader`` and the like give what they give in plain Lightning: for one data rank the
        user's own loaders, not those that shard them.
        """
        known = (DataLoader, DistributedStream)
        shown = [self._prepared.get(one, one) if isinstance(one, known) else one for one in loaders]
        private.show_loaders(combined, shown)

    @property
    def _knows_data_ranks(self) -> bool:
        return self._ranks.world_size > 1 and self._ranks.layout is not None

    def _shard_stream(self, loader: object, mode: RunningStage) -> object:
        ranks = self._ranks
        if ranks.layout is None and ranks.world_size > 1:
            raise ValueError(
                'the training loader is asked for before layout="auto" has been decided, and its samples come in a '
                "stream, which the layout shards; name the layout, or ask for it (estimated_stepping_batches) in "
                "configure_optimizers or later"
            )
        if ranks.data_group is None or ranks.num_data_ranks == 1:
            return loader
        is_training = mode == RunningStage.TRAINING
        batches = data.shard_stream(loader, ranks.num_data_ranks, ranks.data_rank, ranks.data_group, is_training)
        if isinstance(batches, DistributedStream) and isinstance(loader, DataLoader):
            seed_loader(loader, data_rank=0)  # every rank reads the same stream
            share_generator(loader)
        return batches

    def _set_up_evaluation(self, loop: Any, original: Callable[[], None]) -> None:
        """Wraps ``setup_data`` of an evaluation loop, which says how many batches it takes at most.

        They are those of one process, which the ranks take together (seen in Lightning 2.6.6).
        """
        original()
        combined = private.loaders_of(loop)
        if combined is None:
            return
        limits = private.limits_of(loop)
        for index, loader in enumerate(combined.flattened):
            batches = _distributed(loader)
            if batches is not None:
                limits[index] = batches.limit(limits[index])
        self.show(combined, combined.flattened)

    def index_of_batch(self, args: tuple[Any, ...]) -> tuple[int, ...]:
        """Index of the batch of an evaluation step, and of its loader; where the step takes none, it is counted."""
        self._num_evaluated += 1
        return args[1:3] if len(args) > 1 else (self._num_evaluated - 1,)

    def batches_of(self, dataloader_idx: int) -> DistributedBatches | DistributedStream | None:
        """The batches of an evaluation loader that are this rank's; None where the user shards them."""
        combined = private.loaders_of(private.evaluation_loop(self._trainer))
        loaders = combined.flattened if combined is not None else []
        if combined is None or dataloader_idx >= len(loaders):
            return None
        batches = [_distributed(loader) for loader in loaders]
        if private.mode_of(combined) == "sequential":
            return batches[dataloader_idx]
        # a batch of all loaders is this rank's own for as long as that of the longest is
        parts = [part for part in batches if part is not None]
        return max(parts, key=lambda part: part.total) if len(parts) == len(batches) else None

    def counts(self, batch_idx: int, dataloader_idx: int = 0) -> bool:
        """Whether this evaluation batch is this rank's own, not one that it repeats to run along."""
        batches = self.batches_of(dataloader_idx)
        return batches is None or batches.counts(batch_idx)

    def drop_prediction(self, batch_idx: int, dataloader_idx: int = 0) -> None:
        """A repeated batch is the last of its loader: the loop ends there, or goes on to the next with None."""
        loop = self._trainer.predict_loop
        if loop.epoch_batch_indices[dataloader_idx]:
            loop.epoch_batch_indices[dataloader_idx].pop()
        if dataloader_idx == loop.num_dataloaders - 1:
            raise StopIteration


def _distributed(loader: object) -> DistributedBatches | DistributedStream | None:
    return loader if isinstance(loader, DistributedStream) else data.distributed_batches(loader)
