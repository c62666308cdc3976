"""LitData and WebDataset shard by the data rank: peers of tp read the same, data ranks read apart."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from tests.data.shards.files import numbered_tars
from tests.data.strategies import strategy_of
from tests.support import models
from tests.support.parity import QUIET, slow
from tests.support.ranks import RankError, run_on_ranks

SIZE = 32


def sample(number: int) -> tuple[Tensor, int]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(models.WIDTH, generator=generator), number


def of_tar(parts: dict[str, bytes]) -> tuple[Tensor, int]:
    return sample(int(parts["cls"]))


def split_by_node(folder: Path, workers: int) -> Any:
    import webdataset as wds

    urls = f"{folder}/tars/shard-{{0000..0003}}.tar"
    data = wds.WebDataset(urls, shardshuffle=False, nodesplitter=wds.split_by_node).map(of_tar)
    return DataLoader(data, batch_size=4, num_workers=workers)


def web_loader(folder: Path, workers: int) -> Any:
    import webdataset as wds

    urls = f"{folder}/tars/shard-{{0000..0003}}.tar"
    data = wds.WebDataset(urls, shardshuffle=False, nodesplitter=wds.split_by_node).map(of_tar).batched(4)
    return wds.WebLoader(data, batch_size=None, num_workers=workers)


def of_one_process(folder: Path, workers: int) -> Any:
    import webdataset as wds

    data = wds.WebDataset(f"{folder}/tars/shard-{{0000..0003}}.tar", shardshuffle=False).map(of_tar)
    return DataLoader(data, batch_size=4, num_workers=workers)


def streaming(folder: Path, workers: int) -> Any:
    import litdata

    data = litdata.StreamingDataset(f"{folder}/lit", shuffle=True, drop_last=True)
    return litdata.StreamingDataLoader(data, batch_size=4, num_workers=workers)


def streaming_in_a_plain_loader(folder: Path, workers: int) -> Any:
    return DataLoader(streaming(folder, workers).dataset, batch_size=4, num_workers=workers)


def combined(folder: Path, workers: int) -> Any:
    import litdata

    parts = [litdata.StreamingDataset(f"{folder}/lit", shuffle=False, drop_last=True) for _ in range(2)]
    data = litdata.CombinedStreamingDataset(parts, iterate_over_all=True, seed=1)
    return litdata.StreamingDataLoader(data, batch_size=4, num_workers=workers)


def spawned(folder: Path, workers: int) -> Any:
    loader = split_by_node(folder, 1)
    return DataLoader(loader.dataset, batch_size=4, num_workers=1, multiprocessing_context="spawn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from litdata.streaming import Cache

    folder = tmp_path_factory.mktemp("streams")
    numbered_tars(folder / "tars", [SIZE // 4] * 4)
    cache = Cache(str(folder / "lit"), chunk_size=8)
    for number in range(SIZE):
        cache[number] = sample(number)
    cache.done()
    cache.merge()
    return folder


class Reads(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = models.Classifier().net
        self.read: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.read.append([int(number) for number in batch[1]])
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.read.append([int(number) for number in batch[1]])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SavesAt(Callback):
    def __init__(self, path: Path | None, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.path is not None and trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def run(
    make: Any,
    layout: str | None,
    folder: Path,
    workers: int,
    evaluates: bool = False,
    saves: tuple[Path | None, int] = (None, 0),
    resumes: Path | None = None,
    made_before: bool = False,
) -> list[list[int]]:
    """The samples of each step of two epochs, or of one evaluation."""
    L.seed_everything(1, verbose=False)
    module, world = Reads(), dist.get_world_size() if dist.is_initialized() else 1
    trainer = L.Trainer(**QUIET, devices=world, strategy=strategy_of(layout), max_epochs=2, callbacks=[SavesAt(*saves)])
    loader = make(folder, workers)
    if made_before:  # as on the first process of a script, which starts the others later
        loader.dataset.distributed_env = type(loader.dataset.distributed_env)(1, 0, 1)
        loader.dataset.drop_last = dist.get_rank() == 1
    if evaluates:
        trainer.validate(module, loader, verbose=False)
    else:
        trainer.fit(module, loader, ckpt_path=resumes, weights_only=False if resumes else None)
    return module.read


MAKERS = [split_by_node, streaming, *map(slow, (web_loader, streaming_in_a_plain_loader, combined))]


@pytest.mark.parametrize("evaluates", [False, slow(True)], ids=["fit", "validate"])
@pytest.mark.parametrize("workers", [0, slow(1)])
@pytest.mark.parametrize("make", MAKERS)
def test_peers_of_tp_read_what_one_process_reads(make: Any, workers: int, evaluates: bool, folder: Path) -> None:
    one = run(make, None, folder, workers, evaluates)
    assert len(one) >= SIZE // 4
    assert run_on_ranks(2, run, make, "tp=2", folder, workers, evaluates) == [one, one]


@pytest.mark.parametrize("workers", [0, slow(1)])
@pytest.mark.parametrize("make", MAKERS)
def test_data_ranks_read_apart_and_all_once(make: Any, workers: int, folder: Path) -> None:
    first, second = run_on_ranks(2, run, make, "dp_shard=2", folder, workers)
    assert len(first) == len(second)
    epoch = [number for steps in (first, second) for batch in steps[: len(steps) // 2] for number in batch]
    times = 2 if make is combined else 1
    assert sorted(epoch) == sorted(list(range(SIZE)) * times)


@pytest.mark.parametrize("make", [split_by_node, slow(streaming)])
def test_peers_within_several_data_ranks_read_alike(make: Any, folder: Path) -> None:
    ranks = run_on_ranks(4, run, make, "dp_shard=2,tp=2", folder, 0)
    assert ranks[0] == ranks[1]
    assert ranks[2] == ranks[3]
    assert sorted(itertools.chain(*ranks[0][:4], *ranks[2][:4])) == list(range(SIZE))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp_shard=2", "tp=2"])
def test_worker_processes_that_are_not_forked_know_their_data_rank(layout: str, folder: Path) -> None:
    ranks = run_on_ranks(2, run, spawned, layout, folder, 1)
    if layout == "tp=2":
        assert ranks[0] == ranks[1]
    read = ranks[0][: len(ranks[0]) // 2] + (ranks[1][: len(ranks[1]) // 2] if layout != "tp=2" else [])
    assert sorted(itertools.chain(*read)) == list(range(SIZE))


def test_a_webdataset_of_one_process_has_the_batches_of_one(folder: Path) -> None:
    one = run(of_one_process, None, folder, 0)
    first, second = run_on_ranks(2, run, of_one_process, "dp_shard=2", folder, 0)
    assert [batch for pair in zip(first, second, strict=True) for batch in pair] == one
    assert run_on_ranks(2, run, of_one_process, "tp=2", folder, 0) == [one, one]


def test_a_webdataset_of_one_process_that_is_not_seeded_stays_refused(folder: Path) -> None:
    with pytest.raises(RankError, match="explicit nodesplitter"):
        run_on_ranks(2, _unseeded, folder)


def _unseeded(folder: Path) -> None:
    os.environ.pop("PL_GLOBAL_SEED", None)
    loader = of_one_process(folder, 0)
    L.Trainer(**QUIET, devices=2, strategy=strategy_of("dp_shard=2"), max_epochs=1).fit(Reads(), loader)


@pytest.mark.parametrize(("layout", "length"), [("tp=2", 8), ("dp_shard=2", 4)])
def test_data_made_before_the_ranks_were_is_theirs(layout: str, length: int, folder: Path) -> None:
    ranks = run_on_ranks(2, run, streaming, layout, folder, 0, False, (None, 0), None, True)
    assert [len(steps) for steps in ranks] == [2 * length] * 2


@pytest.mark.parametrize("step", [3, 4, slow(6)])
def test_litdata_goes_on_within_and_between_epochs(step: int, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    whole = run_on_ranks(2, run, streaming, "dp_shard=2", folder, 0, False, (path, step))
    rest = run_on_ranks(2, run, streaming, "dp_shard=2", folder, 0, False, (None, 0), path)
    assert rest == [steps[step:] for steps in whole]


def test_litdata_within_an_epoch_of_other_data_ranks_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    run_on_ranks(2, run, streaming, "dp_shard=2", folder, 0, False, (path, 3))
    with pytest.raises(RankError, match="has a state for each data rank"):
        run_on_ranks(2, run, streaming, "tp=2", folder, 0, False, (None, 0), path)


def test_the_libraries_are_given_back(folder: Path) -> None:
    assert run_on_ranks(2, _after_a_run, folder) == [(2, 0), (2, 1)]


def _after_a_run(folder: Path) -> tuple[int, int]:
    import litdata
    import webdataset

    run(split_by_node, "tp=2", folder, 0)
    run(streaming, "tp=2", folder, 0)
    rank, world, *_ = webdataset.utils.pytorch_worker_info()
    data = litdata.StreamingDataset(f"{folder}/lit")
    assert (data.distributed_env.world_size, data.distributed_env.global_rank) == (world, rank)
    return world, rank
