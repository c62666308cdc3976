"""LitData and WebDataset, which shard by the ranks of the world: here they are told the data rank instead.

Neither is imported; what is not there is not patched. So ranks of a ``tp`` or ``pp`` group read the same samples.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch.distributed as dist

from lightning_dist.compat import litdata
from lightning_dist.patches import Patches


class StreamingLibraries:
    """Tells the libraries their ranks, until what is patched is undone.

    Args:
        patches: of the run.
    """

    def __init__(self, patches: Patches) -> None:
        self._patches = patches
        self._patched: set[str] = set()

    def tell(self, loader: Any, num_data_ranks: int, data_rank: int) -> None:
        """Their loaders and data sets read what is this data rank's, in worker processes too.

        After ``seed_everything``, a WebDataset without a ``nodesplitter``, written for one process, reads all on every
        rank, as other streams do.
        Where ranks disagree whether LitData drops what does not divide, as processes that made their data set before
        others were started do, it is dropped on several data ranks, and kept on one.

        Communication: one all-gather of objects over the world, for data sets of LitData.
        """
        ranks = num_data_ranks, data_rank
        for name, tell in _LIBRARIES.items():
            if name not in self._patched and tell(ranks, self._patches):
                self._patched.add(name)
        datasets = list(litdata.streaming_datasets(getattr(loader, "dataset", loader)))
        for dataset in datasets:
            self._patches.set(dataset, "distributed_env", type(dataset.distributed_env).detect())
        if datasets and dist.is_initialized():
            self._agree(datasets, num_data_ranks)
        for pipeline in _pipelines(loader):
            self._read_all(pipeline)

    def tell_workers(self, loader: Any, num_data_ranks: int, data_rank: int) -> None:
        """Worker processes that are not forked hear of it too; called once the loader has its ``worker_init_fn``."""
        datasets = litdata.streaming_datasets(getattr(loader, "dataset", loader))
        if next(datasets, None) is None and next(_pipelines(loader), None) is None:
            return
        for inner in _loaders(loader):
            if inner.num_workers:
                begin = partial(_in_worker, (num_data_ranks, data_rank), inner.worker_init_fn)
                self._patches.set(inner, "worker_init_fn", begin)

    def _agree(self, datasets: list[Any], num_data_ranks: int) -> None:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, [dataset.drop_last for dataset in datasets])
        for number, dataset in enumerate(datasets):
            if len({told[number] for told in everyone}) > 1:
                self._patches.set(dataset, "drop_last", num_data_ranks > 1)

    def _read_all(self, pipeline: Any) -> None:
        refuses = getattr(sys.modules.get("webdataset.shardlists"), "single_node_only", None)
        stages = [stage for stage in pipeline.pipeline if stage is not refuses]
        # unseeded, it shuffles apart on each rank: then it stays refused
        if len(stages) < len(pipeline.pipeline) and "PL_GLOBAL_SEED" in os.environ:
            self._patches.set(pipeline, "pipeline", stages)


def _tell_litdata(ranks: tuple[int, int], patches: Patches) -> bool:
    kind = litdata.environment_class()
    if kind is None:
        return False
    original = kind.detect

    def detect(cls: Any) -> Any:
        found = original()
        if "DATA_OPTIMIZER_GLOBAL_RANK" in os.environ:  # it writes a data set now
            return found
        nodes = found.num_nodes if ranks[0] % found.num_nodes == 0 else 1
        return cls(world_size=ranks[0], global_rank=ranks[1], num_nodes=nodes)

    kept = vars(kind)["detect"]
    kind.detect = classmethod(detect)
    patches.also(lambda: setattr(kind, "detect", kept))
    return True


def _tell_webdataset(ranks: tuple[int, int], patches: Patches) -> bool:
    module = sys.modules.get("webdataset.utils")
    if module is None:
        return False
    original: Callable[..., tuple[int, int, int, int]] = module.pytorch_worker_info

    def pytorch_worker_info(group: Any = None) -> tuple[int, int, int, int]:
        _, _, worker, num_workers = original()
        return ranks[1], ranks[0], worker, num_workers

    patches.set(module, "pytorch_worker_info", pytorch_worker_info)
    return True


_LIBRARIES = {"litdata": _tell_litdata, "webdataset": _tell_webdataset}


def _in_worker(ranks: tuple[int, int], user: Callable[[int], Any] | None, worker: int) -> None:
    """A worker process of a loader begins; one that was not forked knows of no patch."""
    for tell in _LIBRARIES.values():
        tell(ranks, Patches())
    if user is not None:
        user(worker)


def _pipelines(source: Any) -> Iterator[Any]:
    """The pipelines of WebDataset in a loader, the ones inside of others too."""
    if "webdataset" not in sys.modules:
        return
    source = getattr(source, "dataset", source)
    if isinstance(stages := getattr(source, "pipeline", None), list):
        yield source
        for stage in stages:
            yield from _pipelines(stage)


def _loaders(source: Any) -> Iterator[Any]:
    """Those with workers, of a loader or a pipeline that has one."""
    if hasattr(source, "num_workers") and hasattr(source, "worker_init_fn"):
        yield source
    elif isinstance(stages := getattr(source, "pipeline", None), list):
        for stage in stages:
            yield from _loaders(stage)
