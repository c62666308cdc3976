"""The strategy in a user's Trainer: every entry point, every sample once, and what it costs."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from lightning_dist import HybridStrategy
from tests.support import models
from tests.support.collectives import Collectives, counting
from tests.support.models import few_samples, samples
from tests.support.parity import QUIET, Run, assert_equal, once, one_process, train, trainer, whole_weights
from tests.support.ranks import RankError, run_on_ranks

pytestmark = pytest.mark.sampled

LAYOUTS = ["dp_replicate=2", "dp_shard=2"]


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 3, 13, 16])
def test_validation_and_test_count_every_sample_once(layout: str, count: int) -> None:
    """Also where a rank has no batch of its own, and where the last batch is smaller."""
    one = once(_evaluate, "dp_replicate=1", count)
    for values in run_on_ranks(2, _evaluate, layout, count):
        for name, value in one.items():
            torch.testing.assert_close(values[name], value, rtol=1e-5, atol=1e-6, msg=f"{name} {value} {values[name]}")
    assert one["val/count"] == count


def _evaluate(layout: str, count: int) -> dict[str, float]:
    L.seed_everything(1, verbose=False)
    module = models.Classifier()
    runner = trainer(layout)
    loader = DataLoader(samples(count), batch_size=3)
    validated = runner.validate(module, loader, verbose=False)[0]
    tested = runner.test(module, loader, verbose=False)[0]
    assert validated == tested
    return validated


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_evaluation_loaders_count_every_sample_once(layout: str) -> None:
    one = once(_evaluate_two, "dp_replicate=1")
    for values in run_on_ranks(2, _evaluate_two, layout):
        torch.testing.assert_close(values, one, rtol=1e-5, atol=1e-6)


class TwoLoaders(models.Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # type: ignore[override]
        self.log("mean", self(batch[0]).mean(), on_step=False, on_epoch=True)
        self.log("count", float(len(batch[0])), reduce_fx="sum")


def _evaluate_two(layout: str) -> list[dict[str, float]]:
    L.seed_everything(1, verbose=False)
    loaders = [DataLoader(samples(count), batch_size=3) for count in (4, 7)]
    return [dict(values) for values in trainer(layout).validate(TwoLoaders(), loaders, verbose=False)]


class WithoutIndex(models.Classifier):
    def validation_step(self, batch: Any) -> None:  # type: ignore[override]
        self.log("count", float(len(batch[0])), reduce_fx="sum")

    def predict_step(self, batch: Any) -> torch.Tensor:  # type: ignore[override]
        return batch[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_without_a_batch_index_count_every_sample_once(layout: str) -> None:
    ranks = run_on_ranks(2, _evaluate_without_index, layout)
    assert [count for count, _ in ranks] == [13, 13]
    assert sum(predicted for _, predicted in ranks) == 13


def _evaluate_without_index(layout: str) -> tuple[float, int]:
    loader = DataLoader(few_samples(), batch_size=3)
    validated = trainer(layout).validate(WithoutIndex(), loader, verbose=False)[0]
    predicted = trainer(layout).predict(WithoutIndex(), loader)
    return validated["count"], sum(len(batch) for batch in predicted or [])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prediction_returns_every_sample_once_in_order(layout: str) -> None:
    one = once(_predict, "dp_replicate=1")
    ranks = run_on_ranks(2, _predict, layout)
    dealt = [ranks[index % 2][index // 2] for index in range(len(one))]
    assert sum(map(len, ranks)) == len(one) == 5
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(dealt, one, strict=True))


def _predict(layout: str) -> list[torch.Tensor]:
    L.seed_everything(1, verbose=False)
    predictions = trainer(layout).predict(models.Classifier(), DataLoader(few_samples(), batch_size=3))
    assert predictions is not None
    return predictions  # type: ignore[return-value]


# ---------------------------------------------------------------- entry points


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fit_twice_then_validate_goes_on_with_the_same_weights(layout: str) -> None:
    one = once(_fit_twice, "dp_shard=1")
    for weights, value in run_on_ranks(2, _fit_twice, layout):
        torch.testing.assert_close(value, one[1], rtol=1e-5, atol=1e-6)
        for name, weight in one[0].items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-6, msg=name)


def _fit_twice(layout: str) -> tuple[dict[str, torch.Tensor], float]:
    L.seed_everything(1, verbose=False)
    module = models.Momentum()
    loader = DataLoader(samples(), batch_size=8 // (dist.get_world_size() if dist.is_initialized() else 1))
    validation = DataLoader(few_samples(), batch_size=4)
    runner = trainer(layout)
    runner.validate(module, validation, verbose=False)
    runner.fit(module, loader)
    runner.fit_loop.max_epochs = 2
    runner.fit(module, loader, validation)
    value = runner.validate(module, validation, verbose=False)[0]["val/loss"]
    return whole_weights(module), value


@pytest.mark.parametrize("layout", [*LAYOUTS, "auto"])
def test_model_built_in_configure_model_starts_as_in_one_process(layout: str) -> None:
    run = Run(models.Deferred, samples)
    one = one_process(run)
    for record in run_on_ranks(2, train, run, layout):
        assert_equal(one, record)


def test_deferred_model_is_never_whole_on_a_rank() -> None:
    assert all(run_on_ranks(2, _built_on_meta))


def _built_on_meta() -> bool:
    class Look(Callback):
        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            self.module = pl_module

    class Deferred(models.Deferred):
        def configure_model(self) -> None:
            super().configure_model()
            assert self.net.stem.weight.untyped_storage().device.type == "meta" or isinstance(
                self.net.stem.weight, DTensor
            )

    module = Deferred()
    trainer("dp_shard=2", max_steps=1).fit(module, DataLoader(samples(), batch_size=4))
    return all(isinstance(p, DTensor) for p in module.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_blocks_train_as_plain_ones(layout: str) -> None:
    plain = Run(models.Momentum, samples)
    compiled = Run(models.Momentum, samples, strategy={"compile": {"backend": "aot_eager"}})
    one = one_process(plain)
    for record in run_on_ranks(2, train, compiled, layout):
        assert_equal(one, record)


# ---------------------------------------------------------------- what it costs


REDUCING_BACKWARD = {
    # the flags of what was used travel with the gradients
    "dp_replicate=2": {"all-reduce": 1},
    # three blocks gathered, the root still is; all four reduced; what was used is agreed upon
    "dp_shard=2": {"all-gather": 3, "reduce-scatter": 4, "all-reduce": 1},
    "dp_replicate=2,dp_shard=2": {"all-gather": 3, "reduce-scatter": 4, "all-reduce": 5},
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "dp_replicate=2,dp_shard=2"])
def test_accumulating_micro_steps_reduce_nothing_and_clipping_takes_one_collective(layout: str) -> None:
    for counts in run_on_ranks(4 if "," in layout else 2, _count, layout):
        assert not {"all-reduce", "reduce-scatter"} & set(counts["accumulate"]), counts
        assert sum(counts["clip"].values()) == (0 if layout == "dp_replicate=2" else 1)
        assert counts["reduce"] == REDUCING_BACKWARD[layout]


def _count(layout: str) -> dict[str, dict[str, int]]:
    world = dist.get_world_size()
    found: dict[str, dict[str, int]] = {}

    class Counting(HybridStrategy):
        def backward(self, *args: Any, **kwargs: Any) -> Any:
            with Collectives() as seen:
                loss = super().backward(*args, **kwargs)
            assert self.parts.module_setup.runner is not None
            found["reduce" if self.parts.module_setup.runner.reduces else "accumulate"] = dict(seen.count)
            return loss

    class Clipped(models.Classifier):
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            with Collectives() as seen:
                super().configure_gradient_clipping(*args, **kwargs)
            found["clip"] = dict(seen.count)

    runner = L.Trainer(
        **QUIET,
        devices=world,
        strategy=Counting(layout),
        max_steps=3,  # DDP sorts its buckets in the second
        accumulate_grad_batches=2,
        gradient_clip_val=0.1,
    )
    runner.fit(Clipped(), DataLoader(samples(), batch_size=4))
    return found


def test_a_step_gathers_the_root_once_and_each_block_twice() -> None:
    """Also where the step calls the module itself, whose forward is the root's too."""
    assert run_on_ranks(2, _gathers) == [[7, 7, 7]] * 2


def _gathers() -> list[int]:
    counts: list[dict[str, int]] = []
    strategy = counting("optimizer_step", counts)("dp_shard=2")
    runner = L.Trainer(**QUIET, devices=2, strategy=strategy, max_steps=3)
    runner.fit(models.Classifier(), DataLoader(samples(), batch_size=4))
    return [count["all-gather"] for count in counts]


@pytest.mark.parametrize(("layout", "shards"), [("dp_shard=2", 2), ("dp_replicate=2,dp_shard=2", 2), ("dp_shard=4", 4)])
def test_a_rank_keeps_its_share_of_the_states(layout: str, shards: int) -> None:
    whole, _ = once(_state_bytes, "dp_shard=1")
    for held, names in run_on_ranks(4 if "4" in layout or "," in layout else 2, _state_bytes, layout):
        assert held <= 1.05 * whole / shards
        assert names == ["net.blocks.0", "net.blocks.1", "net.blocks.2"]


def _state_bytes(layout: str) -> tuple[int, list[str]]:
    module = models.Classifier()
    strategy = HybridStrategy(layout)
    world = dist.get_world_size() if dist.is_initialized() else 1
    held: list[int] = []

    class Weigh(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            tensors = [*pl_module.parameters(), *(p.grad for p in pl_module.parameters() if p.grad is not None)]
            tensors += [v for s in trainer.optimizers[0].state.values() for v in s.values() if v.ndim]
            local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
            held.append(sum(t.numel() * t.element_size() for t in local))

    runner = L.Trainer(**QUIET, devices=world, strategy=strategy, max_steps=3, callbacks=[Weigh()])
    runner.fit(module, DataLoader(samples(), batch_size=4))
    return max(held), strategy.parts.module_setup.sharded_units


# ---------------------------------------------------------------- data


def test_ranks_see_together_what_one_process_sees() -> None:
    one = once(_seen, "dp_shard=1", False)[0]
    ranks = run_on_ranks(2, _seen, "dp_shard=2", False)
    assert [sorted(a + b) for a, b in zip(*(rank[0] for rank in ranks), strict=True)] == [sorted(b) for b in one]


def test_a_users_sampler_is_dealt_in_its_own_order() -> None:
    one = once(_seen, "dp_shard=1", True)[0]
    ranks = run_on_ranks(2, _seen, "dp_replicate=2", True)
    assert [sorted(a + b) for a, b in zip(*(rank[0] for rank in ranks), strict=True)] == [sorted(b) for b in one]


class Numbers(Dataset):
    """Each sample is its index and a random number, as an augmentation draws it."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), float(torch.rand(()))])


class Reader(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.indices: list[list[int]] = []
        self.noise: list[float] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.indices.append(batch[:, 0].int().tolist())
        self.noise += batch[:, 1].tolist()
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


def _seen(layout: str, weighted: bool, workers: int = 0) -> tuple[list[list[int]], list[float]]:
    L.seed_everything(1, workers=True, verbose=False)
    world = dist.get_world_size() if dist.is_initialized() else 1
    data = Numbers()
    sampler = WeightedRandomSampler([1.0 + i for i in range(24)], 24) if weighted else None
    loader = DataLoader(data, batch_size=6 // world, sampler=sampler, num_workers=workers)
    module = Reader()
    trainer(layout, max_epochs=2).fit(module, loader)
    return module.indices, module.noise


@pytest.mark.parametrize("workers", [0, 1])
def test_data_ranks_augment_differently(workers: int) -> None:
    first, second = (noise for _, noise in run_on_ranks(2, _seen, "dp_shard=2", False, workers))
    assert not set(first) & set(second)


# ---------------------------------------------------------------- callbacks and refusals


@pytest.mark.parametrize("layout", LAYOUTS)
def test_model_checkpoint_and_lr_monitor_follow_the_monitored_value(layout: str, tmp_path: Path) -> None:
    one = _best(tmp_path / "one", "dp_shard=1")
    for best in run_on_ranks(2, _best, tmp_path / "ranks", layout):
        assert best[0] == one[0]
        assert best[1] == pytest.approx(one[1], rel=1e-5)
    logged = (tmp_path / "ranks" / "csv" / "version_0" / "metrics.csv").read_text()
    assert "lr-SGD" in logged
    assert "val/loss" in logged


def _best(folder: Path, layout: str) -> tuple[str, float]:
    L.seed_everything(1, verbose=False)
    world = dist.get_world_size() if dist.is_initialized() else 1
    best = ModelCheckpoint(folder, monitor="val/loss", filename="{epoch}", save_top_k=1)
    runner = trainer(
        layout,
        max_epochs=4,
        callbacks=[best, LearningRateMonitor()],
        logger=CSVLogger(folder, name="csv", version=0),
        enable_checkpointing=True,
        log_every_n_steps=1,
    )
    runner.fit(models.Plateau(), DataLoader(samples(), batch_size=8 // world), DataLoader(few_samples(), batch_size=4))
    assert best.best_model_score is not None
    runner.strategy.barrier()  # rank 0 removes the former best
    assert len([path for path in folder.iterdir() if path.suffix == ".ckpt"]) == 1
    return Path(best.best_model_path).name, float(best.best_model_score)


@pytest.mark.parametrize("layout", ["dp_replicate=2", "dp_shard=2"])
def test_weight_averaging_equals_one_process(layout: str) -> None:
    one = once(_average, "dp_replicate=1")
    for weights in run_on_ranks(2, _average, layout):
        for name, weight in one.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-6, msg=name)


def _average(layout: str) -> dict[str, torch.Tensor]:
    L.seed_everything(1, verbose=False)
    world = dist.get_world_size() if dist.is_initialized() else 1
    module = models.Momentum()
    runner = trainer(layout, max_epochs=4, callbacks=[StochasticWeightAveraging(0.05, swa_epoch_start=1)])
    runner.fit(module, DataLoader(samples(), batch_size=8 // world))
    return whole_weights(module)


def test_fewer_samples_than_data_ranks_are_refused() -> None:
    with pytest.raises(RankError, match="1 samples for 2 data ranks"):
        run_on_ranks(2, _fit_samples, 1)


def _fit_samples(count: int) -> None:
    trainer("dp_shard=2").fit(models.Classifier(), DataLoader(samples(count), batch_size=1))


def test_a_layout_that_does_not_fit_is_refused_when_the_trainer_is_made() -> None:
    with pytest.raises(ValueError, match=r"needs 3 ranks, but there are 2; layouts that fit: .*dp_shard=2"):
        L.Trainer(**QUIET, devices=2, strategy=HybridStrategy("dp_shard=3"))


def test_axes_of_later_versions_are_refused() -> None:
    with pytest.raises(ValueError, match="asks for cp=2"):
        L.Trainer(**QUIET, devices=2, strategy=HybridStrategy("cp=2"))


def test_shard_units_that_match_nothing_are_refused_with_the_closest_names() -> None:
    with pytest.raises(RankError, match=r"'net.block.\*', which no module of the network matches; the closest are"):
        run_on_ranks(2, _fit_units, ["net.block.*"])


@pytest.mark.parametrize("units", [["net.blocks.*"], ["Block"], [models.Block]])
def test_shard_units_by_name_class_name_and_class(units: list[Any]) -> None:
    assert run_on_ranks(2, _fit_units, units)[0] == ["net.blocks.0", "net.blocks.1", "net.blocks.2"]


def _fit_units(units: list[Any]) -> list[str]:
    runner = trainer("dp_shard=2", strategy={"shard_units": units}, max_steps=1)
    runner.fit(models.Classifier(), DataLoader(samples(), batch_size=4))
    assert isinstance(runner.strategy, HybridStrategy)
    return runner.strategy.parts.module_setup.sharded_units


class Masked(models.Classifier):
    """With a buffer at the edge of its dtype: averaging it would overflow."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((4, 4), torch.finfo(torch.float32).min).triu(1))


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(samples(6))


def test_constant_buffers_iterable_data_and_own_batch_samplers_work_as_ever() -> None:
    for kept, evaluated, indices in run_on_ranks(2, _odd_parts):
        assert kept
        assert evaluated == 6.0  # of an iterable data set that nobody deals each rank takes its share
        assert indices == [4, 4]


def _odd_parts() -> tuple[bool, float, list[int]]:
    module = Masked()
    before = module.mask.clone()
    runner = trainer("dp_shard=2", strategy={"shard_units": "net.blocks.*"}, max_steps=2)
    sampler = torch.utils.data.BatchSampler(WeightedRandomSampler([1.0] * 64, 16), 4, False)
    seen: list[int] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *args: Any) -> None:
            seen.append(len(batch[0]))

    runner.callbacks.append(Look())  # type: ignore[attr-defined]
    runner.fit(module, DataLoader(samples(), batch_sampler=sampler), DataLoader(few_samples(), batch_size=4))
    value = runner.validate(module, DataLoader(Endless(), batch_size=3), verbose=False)[0]["val/count"]
    return torch.equal(module.mask, before), value, seen


def test_auto_averages_weights_where_it_replicates() -> None:
    assert all(run_on_ranks(2, _average, "auto"))


@pytest.mark.parametrize("layout", [*LAYOUTS, "pp=2"])
def test_nothing_of_a_fit_stays_alive(layout: str) -> None:
    assert run_on_ranks(2, _left_over, layout) == [[], []]


def _left_over(layout: str) -> list[str]:
    """Kinds of what is still there of a fit that nobody refers to any more."""
    runner = trainer(layout)
    module = models.Classifier()
    runner.fit(module, DataLoader(samples(), batch_size=8))
    watched = [weakref.ref(thing) for thing in (runner, runner.strategy, module, next(module.parameters()))]
    del runner, module
    gc.collect()
    return [type(thing()).__name__ for thing in watched if thing() is not None]
