"""Ours, Lightning's strategies, and a loop written by hand: each trains a workload for a number of steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from lightning_dist import HybridStrategy
from lightning_dist.plans import find_blocks
from recipes.benchmark.agreement import whole_weights
from recipes.benchmark.device import rank_device
from recipes.benchmark.interleaving import Pace, Weights
from recipes.benchmark.llama import AfterStep
from recipes.benchmark.workloads import Workload


@dataclass(frozen=True)
class Fit:
    """``Trainer.fit`` of a workload under a strategy.

    Args:
        workload: what is trained.
        strategy: makes the strategy.
        by_hand: the module shards itself in ``configure_model``, as ``ModelParallelStrategy`` asks.
        in_order: the loader has a sampler that deals samples in their order; Lightning's own shuffles them.
        options: of the Trainer.
        callbacks: that look on.
    """

    workload: Workload
    strategy: Callable[[], Strategy]
    by_hand: bool = False
    in_order: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    callbacks: tuple[Callback, ...] = ()

    def __call__(self, pace: Pace, num_steps: int) -> Weights:
        """Trains for ``num_steps`` batches of each rank."""
        ranks = dist.get_world_size()
        trainer = pl.Trainer(
            accelerator=rank_device().type,
            devices=ranks,
            strategy=self.strategy(),
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*self.callbacks, AfterStep(pace)],
            **dict(self.options),
        )
        kind = _sharding_itself(self.workload.recipe_class) if self.by_hand else None
        loader = self.workload.loader(num_steps * ranks)
        module = self.workload.module(kind)  # the last to seed before configure_model draws the weights
        trainer.fit(module, deal_in_order(loader) if self.in_order else loader)
        return lambda: whole_weights(module.model)


@dataclass(frozen=True)
class HandWritten:
    """The loop that a user of ``fully_shard`` writes, without Lightning: the same blocks, optimizer and batches.

    Args:
        workload: what is trained.
        replicas: copies of the shards; the rest of the ranks shards.
        clip_norm: norm to clip gradients at; None not to.
        accumulate: batches per optimizer step.
        foreach: of the optimizer; None to let torch choose.
        around_step: makes a context manager that is open during each batch.
    """

    workload: Workload
    replicas: int = 1
    clip_norm: float | None = None
    accumulate: int = 1
    foreach: bool | None = None
    around_step: Callable[[], Any] = nullcontext

    def __call__(self, pace: Pace, num_steps: int) -> Weights:
        """Trains for ``num_steps`` batches of each rank."""
        module = self.workload.module()
        module.configure_model()
        network = module.model.to(rank_device())
        shard_by_hand(network, mesh_by_hand(self.replicas))
        optimizer = module.configure_optimizers()
        for param_group in optimizer.param_groups:
            param_group["foreach"] = self.foreach
        batches = deal_in_order(self.workload.loader(num_steps * dist.get_world_size()))
        network.train()
        for number, batch in enumerate(move_data_to_device(batch, rank_device()) for batch in batches):
            with self.around_step():
                last = (number + 1) % self.accumulate == 0
                network.set_requires_gradient_sync(last)
                loss = self.workload.loss(network, batch)
                (loss / self.accumulate).backward()
                if last:
                    if self.clip_norm is not None:
                        nn.utils.clip_grad_norm_(network.parameters(), self.clip_norm)
                    optimizer.step()
                    optimizer.zero_grad()
            pace(loss.detach())
        return lambda: whole_weights(network)


def deal_in_order(loader: DataLoader) -> DataLoader:
    """Batches of this rank's samples, as HybridStrategy deals those of an ordinary loader."""
    sampler: DistributedSampler = DistributedSampler(loader.dataset, shuffle=False)
    return DataLoader(loader.dataset, batch_size=loader.batch_size, sampler=sampler)


def mesh_by_hand(replicas: int = 1) -> DeviceMesh:
    """The mesh that a user of ``fully_shard`` makes."""
    kind, ranks = rank_device().type, dist.get_world_size()
    if replicas == 1:
        return init_device_mesh(kind, (ranks,))
    return init_device_mesh(kind, (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))


def shard_by_hand(network: nn.Module, mesh: DeviceMesh) -> None:
    """The blocks, then the rest."""
    for block in find_blocks(network).values():
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    assert isinstance(network, FSDPModule)


def _sharding_itself(recipe: type[pl.LightningModule]) -> type[pl.LightningModule]:
    class ShardingItself(recipe):  # type: ignore[misc,valid-type]
        def configure_model(self) -> None:
            super().configure_model()
            shard_by_hand(self.model, self.device_mesh["data_parallel"])

    return ShardingItself


def ours(workload: Workload, layout: str, **arguments: Any) -> Fit:
    """HybridStrategy over a layout."""
    return Fit(workload, lambda: HybridStrategy(layout), **arguments)


def lightning_ddp(workload: Workload, **arguments: Any) -> Fit:
    """Lightning's ``ddp``."""
    return Fit(workload, DDPStrategy, in_order=True, **arguments)


def lightning_model_parallel(workload: Workload) -> Fit:
    """Lightning's ModelParallelStrategy, around a module that shards itself."""
    return Fit(
        workload,
        lambda: ModelParallelStrategy(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1),
        by_hand=True,
        in_order=True,
    )


def free_of_noise() -> None:
    """One thread per rank, and no word from Lightning."""
    import logging
    import warnings

    torch.set_num_threads(1)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
