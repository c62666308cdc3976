"""Lightning's finders of a batch size and of a learning rate, over ranks, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy, Layout
from lightning_dist.random_states import CPU, RandomStates
from lightning_dist.ranks import LayoutRanks
from lightning_dist.tuning import Tuning
from tests.support import models
from tests.support.parity import QUIET, Record, Watch, assert_equal, slow, whole_weights
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

LAYOUTS = [
    ("dp_replicate=2", 2),
    ("dp_shard=2", 2),
    pytest.param("dp_replicate=2,dp_shard=2", 4, marks=pytest.mark.slow),
    ("tp=2", 2),
    ("pp=2", 2),
]
PLAN = {"net.blocks.*.up": "colwise", "net.blocks.*.down": "rowwise"}
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 1 TiB"


class Sized(models.Momentum):
    """Asks for batches of its own size."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return DataLoader(models.samples(), self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(models.few_samples(), self.batch_size)

    test_dataloader = val_dataloader


class Overflowing(Sized):
    """Some ranks run out of memory in a step with more than eight samples."""

    def __init__(self, where: str, ranks: tuple[int, ...]) -> None:
        super().__init__(2)
        self.where, self.ranks = where, ranks

    def _overflow(self, where: str, x: Tensor) -> None:
        if where == self.where and len(x) > 8 and self.global_rank in self.ranks:
            raise RuntimeError(OUT_OF_MEMORY)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        with self.net.blocks[1].register_forward_hook(lambda *_: self._overflow("within", x)):  # type: ignore
            loss = super().training_step(batch, batch_idx)
        self._overflow("forward", x)
        loss.register_hook(lambda _: self._overflow("backward", x))
        self.x = x
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: self._overflow("step", self.x))
        return optimizer


class Saw(Callback):
    """How things stand when a fit starts."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        random = RandomStates.now(CPU)
        self.seen = [
            whole_weights(pl_module),
            len(trainer.optimizers[0].state),
            trainer.global_step,
            trainer.current_epoch,
            (random.cpu.tolist(), random.python, random.numpy[1].tolist()),
        ]


def search(layout: str | None, module: Any, finder: Any, folder: str) -> tuple[Any, Record, bool]:
    """What a finder found, the training after it, and whether it left things as they were."""
    L.seed_everything(1, verbose=False)
    module, finder, watch, before, after = module(), finder(), Watch(), Saw(), Saw()
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    plan: Any = {"tensor_plan": PLAN} if layout is not None and "tp" in layout else {}
    trainer = L.Trainer(
        **{**QUIET, "callbacks": [before, finder, after, watch], "max_epochs": 2, "log_every_n_steps": 1},
        default_root_dir=folder,
        devices=world,
        strategy="auto" if layout is None else HybridStrategy(layout, **plan),
    )
    trainer.fit(module)
    found = finder.optimal_lr.results if isinstance(finder, LearningRateFinder) else finder.optimal_batch_size
    found = (found, finder.optimal_lr.suggestion()) if isinstance(finder, LearningRateFinder) else found
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    record = Record(watch.losses, watch.norms(), logged, whole_weights(module))
    (weights, *rest), (weights_then, *rest_then) = before.seen, after.seen
    same = rest == rest_then and all(torch.equal(weights[name], weights_then[name]) for name in weights)
    return found, record, same and not list(Path(folder).iterdir())


def lr_finder() -> LearningRateFinder:
    return LearningRateFinder(min_lr=1e-4, num_training_steps=16)


def size_finder(ranks: int = 1, mode: str = "power") -> BatchSizeFinder:
    return BatchSizeFinder(mode, steps_per_trial=2, init_val=8 // ranks)


class Halved(Sized):
    """For two data ranks."""

    def __init__(self) -> None:
        super().__init__(4)


class Quartered(Sized):
    """For four data ranks."""

    def __init__(self) -> None:
        super().__init__(2)


def module_of(layout: str) -> type[Sized]:
    return {1: Sized, 2: Halved, 4: Quartered}[num_data_ranks(layout)]


def num_data_ranks(layout: str) -> int:
    parsed: Any = Layout.parse(layout)
    return int(parsed.resolve(2 ** layout.count("=2")).num_data_ranks)


def half_size_finder() -> BatchSizeFinder:
    return size_finder(2)


def quarter_size_finder() -> BatchSizeFinder:
    return size_finder(4)


SIZE_FINDERS: dict[int, Any] = {1: size_finder, 2: half_size_finder, 4: quarter_size_finder}


@pytest.mark.parametrize(
    "finder",
    [pytest.param(lr_finder, id="learning_rate"), pytest.param(size_finder, id="batch_size", marks=pytest.mark.slow)],
)
def test_one_process_finds_what_lightning_finds(finder: Any, tmp_path: Path) -> None:
    found, record, _ = search(None, Sized, finder, str(tmp_path))
    ours, our_record, same = search("dp_replicate=1", Sized, finder, str(tmp_path))
    assert same
    assert ours == found
    assert_equal(record, our_record)


@pytest.mark.parametrize(("layout", "ranks"), LAYOUTS)
def test_learning_rate_is_that_of_one_process(layout: str, ranks: int, tmp_path: Path) -> None:
    (one, suggestion), record, _ = search(None, Sized, lr_finder, str(tmp_path))
    for (found, suggested), other, same in run_on_ranks(
        ranks, search, layout, module_of(layout), lr_finder, str(tmp_path)
    ):
        assert same
        torch.testing.assert_close(found["loss"], one["loss"], rtol=1e-5, atol=1e-6)
        assert found["lr"] == one["lr"]
        assert suggested == suggestion
        assert_equal(record, other)


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        slow("dp_replicate=2", 2),
        slow("dp_shard=2", 2),
        slow("dp_replicate=2,dp_shard=2", 4),
        slow("tp=2", 2),
        slow("pp=2", 2),
    ],
)
def test_batch_size_is_that_of_one_process(layout: str, ranks: int, tmp_path: Path) -> None:
    data_ranks = num_data_ranks(layout)
    size, record, _ = search(None, Sized, size_finder, str(tmp_path))
    results = run_on_ranks(ranks, search, layout, module_of(layout), SIZE_FINDERS[data_ranks], str(tmp_path))
    for found, other, same in results:
        assert same
        assert found * data_ranks == size == 64, "that of the data set"
        assert_equal(record, other)


def search_size(layout: str, where: str, failing: tuple[int, ...], mode: str) -> tuple[int | None, bool]:
    finder = BatchSizeFinder(mode, steps_per_trial=2, init_val=2)
    module = Overflowing(where, failing)
    trainer = L.Trainer(
        **{**QUIET, "callbacks": [finder]},
        max_steps=3,
        devices=torch.distributed.get_world_size(),
        strategy=HybridStrategy(layout),
    )
    trainer.fit(module)
    finite = all(bool(p.isfinite().all()) for p in whole_weights(module).values())
    return finder.optimal_batch_size, finite and trainer.global_step == 3


@pytest.mark.parametrize(
    ("layout", "where", "failing", "mode"),
    [
        slow("dp_replicate=2", "within", (1,), "power"),
        ("dp_replicate=2", "forward", (0,), "binsearch"),
        ("dp_replicate=2", "backward", (1,), "power"),
        slow("dp_replicate=2", "step", (1,), "power"),
        slow("dp_shard=2", "within", (0, 1), "power"),
        slow("dp_shard=2", "forward", (1,), "power"),
        ("dp_shard=2", "step", (1,), "power"),
    ],
)
def test_ranks_agree_when_some_run_out_of_memory(layout: str, where: str, failing: tuple[int, ...], mode: str) -> None:
    size = 7 if mode == "binsearch" else 8  # less five per cent
    assert run_on_ranks(2, search_size, layout, where, failing, mode) == [(size, True)] * 2


def tune(layout: str | None) -> tuple[list[int | None], float | None, list[float]]:
    L.seed_everything(1, verbose=False)
    module, watch = Sized(2), Watch()
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    trainer = L.Trainer(
        **{**QUIET, "callbacks": [watch]},
        max_steps=4,
        devices=world,
        strategy="auto" if layout is None else HybridStrategy(layout),
    )
    tuner, sizes = Tuner(trainer), []
    for method in ("fit", "validate", "test"):
        sizes.append(tuner.scale_batch_size(module, method=method, init_val=4 // world, max_trials=2))  # type: ignore
    module.batch_size = 8 // world
    finder = tuner.lr_find(module, min_lr=1e-4, num_training=14)
    assert finder is not None
    watch.losses.clear()
    trainer.fit(module)
    return sizes, finder.suggestion(), watch.losses


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp_replicate=2", "dp_shard=2"])
def test_tuner_finds_what_it_finds_in_one_process(layout: str) -> None:
    sizes, suggestion, losses = tune(None)
    for found, suggested, other in run_on_ranks(2, tune, layout):
        assert [2 * size for size in found] == sizes
        assert suggested == suggestion
        torch.testing.assert_close(other, losses, rtol=1e-5, atol=1e-6)


def test_one_process_is_not_distributed() -> None:
    trainer = L.Trainer(**{**QUIET, "strategy": "hybrid", "devices": 1})
    assert not trainer.strategy.is_distributed  # type: ignore[attr-defined]


def test_without_a_search_nothing_is_agreed_on() -> None:
    """A part of the strategy, made without a Trainer."""
    trainer: Any = None
    tuning = Tuning(LayoutRanks(None))
    assert tuning.begin("last.ckpt", trainer, None) == tuning.path("last.ckpt") == "last.ckpt"
    assert not tuning.is_searching
    assert tuning.fits is None
    assert not tuning.ends_with(".lr_find_1.ckpt")
