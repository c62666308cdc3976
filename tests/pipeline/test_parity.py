"""Pipelines train as one process does: losses, norms, logged values and weights on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset

from lightning_dist import HybridStrategy
from lightning_dist.parallel.pipeline.schedule import SCHEDULES
from lightning_dist.placeholder import is_placeholder
from tests.recipes.runs import RUNS
from tests.support import models
from tests.support.collectives import StepCollectives
from tests.support.models import few_samples, samples
from tests.support.parity import (
    QUIET,
    Record,
    Run,
    Watch,
    assert_equal,
    assert_parity,
    on_layout,
    once,
    one_process,
    slow,
    train,
)
from tests.support.ranks import RankError, RankPool, run_on_ranks

pytestmark = pytest.mark.sampled

ACCUMULATE: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}


class Normalised(models.Classifier):
    """BatchNorm: its statistics are those of a microbatch, so the tests run one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(models.WIDTH, 32), nn.BatchNorm1d(32), nn.ReLU(inplace=True), nn.Linear(32, 32),
            nn.BatchNorm1d(32), nn.ReLU(inplace=True), nn.Linear(32, models.CLASSES),
        )  # fmt: skip


class Answering(models.Classifier):
    """Returns more than its loss, logs in several ways, and measures before the end."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (x, y), names = batch["pair"], batch["names"]
        self.log("train/calls", 1, reduce_fx="sum")
        hidden = self.net.stem(x)
        for block in self.net.blocks:
            hidden = block(hidden)
        logits = self.net.head(self.net.norm(hidden))
        loss = F.cross_entropy(logits, y)
        self.log("train/samples", float(len(y)), reduce_fx="sum")
        self.log_dict({"train/loss": loss, "train/mean": logits.mean()}, on_step=True, on_epoch=True, prog_bar=True)
        self.accuracy(logits, y)
        self.log("train/accuracy", self.accuracy, on_step=True, on_epoch=True)
        assert len(names) == len(y)
        return {"loss": loss, "classes": logits.argmax(-1), "names": names}

    def on_train_epoch_end(self) -> None:
        self.log("hook/sum", 2.0, reduce_fx="sum")
        self.log("hook/mean", 3.0)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if "classes" in outputs:
            assert outputs["names"] == batch["names"]
            self.seen.append(outputs["classes"].tolist())


def nested(samples: list[Any]) -> dict[str, Any]:
    x, y = (torch.stack(column) for column in zip(*samples, strict=True))
    return {"pair": (x, y), "names": [f"sample {int(label)}" for label in y]}


CASES: dict[str, tuple[Run, str, int]] = {
    "plain": (Run(models.Classifier, samples, few_samples), "pp=2", 2),
    "four-stages": (Run(models.Classifier, samples, few_samples), "pp=4", 4),
    "small-batches": (Run(models.Classifier, few_samples, few_samples, batch_size=6), "pp=2", 2),
    "tied": (Run(models.Tied, samples, few_samples, trainer=ACCUMULATE), "pp=2", 2),
    "frozen": (Run(models.Frozen, samples, few_samples), "pp=4", 4),
    "unused": (Run(models.Unused, samples, few_samples), "pp=2", 2),
    "plateau": (Run(models.Plateau, samples, few_samples, trainer={"max_epochs": 3}), "pp=2", 2),
    "accumulate-and-clip": (Run(models.Grouped, samples, few_samples, trainer=ACCUMULATE), "pp=2", 2),
    "double": (Run(models.Grouped, models.wide_samples, trainer={"precision": "64-true"}), "pp=2", 2),
    "replicate": (Run(models.Grouped, samples, few_samples, trainer=ACCUMULATE), "pp=2,dp_replicate=2", 4),
    "shard": (Run(models.Grouped, samples, few_samples, trainer=ACCUMULATE), "pp=2,dp_shard=2", 4),
    "shard-tied": (Run(models.Tied, samples, few_samples, trainer=ACCUMULATE), "pp=2,dp_shard=2", 4),
    "tensor": (
        Run(models.Grouped, samples, few_samples, trainer=ACCUMULATE, strategy={"tensor_plan": models.BLOCK_PLAN}),
        "pp=2,tp=2",
        4,
    ),
    "shard-gathered-often": (
        Run(models.Grouped, samples, few_samples, trainer=ACCUMULATE, strategy={"pipeline_reshard": True}),
        "pp=2,dp_shard=2",
        4,
    ),
    "recomputed": (
        Run(models.Grouped, samples, few_samples, strategy={"activation_checkpointing": "full"}),
        "pp=2",
        2,
    ),
    "shard-recomputed-in-part": (
        Run(models.Grouped, samples, few_samples, strategy={"activation_checkpointing": "selective"}),
        "pp=2,dp_shard=2",
        4,
    ),
    "compiled": (Run(models.Grouped, samples, strategy={"compile": {"backend": "aot_eager"}}), "pp=2", 2),
    "shard-compiled": (
        Run(models.Grouped, samples, strategy={"compile": {"backend": "aot_eager"}}),
        "pp=2,dp_shard=2",
        4,
    ),
    "batchnorm": (
        Run(Normalised, samples, few_samples, strategy={"num_microbatches": 1, "pipeline_schedule": "GPipe"}),
        "pp=2",
        2,
    ),
}


ON_DEMAND = {"shard-tied", "shard-gathered-often", "shard-recomputed-in-part", "shard-compiled"}
"""What two ranks, or the shards alone, show too."""


@pytest.mark.parametrize("name", [slow(name) if name in ON_DEMAND else name for name in CASES])
def test_training_equals_one_process(name: str) -> None:
    run, layout, num_ranks = CASES[name]
    assert_parity(run, layout, num_ranks)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_equals_one_process(schedule: str) -> None:
    run = Run(models.deep, samples, few_samples, trainer=ACCUMULATE, strategy={"pipeline_schedule": schedule})
    assert_parity(run, "pp=2", 2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pp=2", "pp=2,dp_shard=2"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("recipe", RUNS)
def test_twenty_steps_of_the_recipes_equal_one_process(recipe: str, schedule: str, layout: str) -> None:
    run = replace(RUNS[recipe], strategy={"pipeline_schedule": schedule})
    assert_parity(run, layout, 4 if "," in layout else 2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pp=2,tp=2", "pp=2,dp_replicate=2"])
def test_twenty_steps_of_a_language_model_equal_one_process(layout: str) -> None:
    run = replace(RUNS["language_model"], strategy={"sequence_parallel": "tp" in layout})
    assert_parity(run, layout, 4)


def test_batches_outputs_and_logs_of_any_form_equal_one_process() -> None:
    one, first = _answers(None), run_on_ranks(2, _answers, "pp=2")
    for record, seen in first:
        assert_equal(one[0], record)
        assert seen in ([], one[1])
    assert first[1][1] == one[1]


def _answers(layout: str | None) -> tuple[Record, list[Any]]:
    L.seed_everything(1, verbose=False)
    module, watch = Answering(), Watch()
    strategy: Any = "auto" if layout is None else HybridStrategy(layout)
    world = 1 if layout is None else 2
    trainer = L.Trainer(**QUIET, devices=world, strategy=strategy, max_epochs=1, callbacks=[watch], log_every_n_steps=1)
    trainer.fit(module, DataLoader(few_samples(), batch_size=5, collate_fn=nested))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return Record(watch.losses, watch.norms(), logged, {}), module.seen


def test_half_precision_stays_within_its_rounding() -> None:
    run = Run(models.Grouped, samples, few_samples, trainer={"precision": "16-mixed", "gradient_clip_val": 0.1})
    one = one_process(run)
    for record in on_layout(run, "pp=2", 2):
        torch.testing.assert_close(record.losses, one.losses, rtol=2e-3, atol=2e-3)


def test_a_rank_holds_its_stages_only() -> None:
    for held, states in run_on_ranks(2, _held):
        assert held <= 0.7
        assert states <= 0.7


class Held(L.Callback):
    """Which part of the parameters, and of their states, a rank holds while it trains."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        whole = sum(p.numel() for p in models.deep().parameters())
        (optimizer,) = trainer.optimizers
        states = sum(s["exp_avg"].numel() for s in optimizer.state.values())
        assert len(list(pl_module.parameters())) == sum(len(group["params"]) for group in optimizer.param_groups)
        held = sum(p.numel() for p in pl_module.state_dict().values() if type(p) is Tensor)
        self.parts = held / whole, states / whole


def _held() -> tuple[float, float]:
    held = Held()
    trainer = L.Trainer(**QUIET, devices=2, strategy=HybridStrategy("pp=2"), max_epochs=1, callbacks=[held])
    trainer.fit(models.deep(), DataLoader(samples(), batch_size=8))
    return held.parts


def test_predictions_come_whole_and_in_order() -> None:
    one = once(_predict, "dp_shard=1")
    for predicted in run_on_ranks(2, _predict, "pp=2"):
        assert torch.equal(one, predicted)


def _predict(layout: str) -> Tensor:
    L.seed_everything(1, verbose=False)
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    trainer = L.Trainer(**QUIET, devices=world, strategy=HybridStrategy(layout))
    return torch.cat(trainer.predict(models.Classifier(), DataLoader(few_samples(), batch_size=4)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("saving", "saved_as", "loading"),
    [
        ("pp=2", "sharded", "pp=4"),
        slow("pp=2", "single", "pp=4"),
        slow("pp=2,dp_shard=2", "sharded", "dp_shard=2"),
        ("pp=2,dp_shard=2", "single", None),
        slow(None, "single", "pp=2,dp_shard=2"),
        ("dp_shard=2", "sharded", "pp=2"),
    ],
)
def test_a_run_goes_on_under_another_layout(
    saving: str | None, saved_as: str, loading: str | None, tmp_path: Path
) -> None:
    whole = once(_fit, None, None, 2, None)
    first = _on(saving, tmp_path, 1, None, saved_as)
    second = _on(loading, tmp_path / "second", 2, tmp_path / "last.ckpt")
    torch.testing.assert_close([*first, *second], whole, rtol=1e-5, atol=1e-6)


def _on(layout: str | None, folder: Path, epochs: int, resume: Path | None, saved_as: str = "auto") -> list[float]:
    if layout is None:
        return _fit(folder, None, epochs, resume)
    num_ranks = {"pp=2": 2, "dp_shard=2": 2}.get(layout, 4)
    first, *others = run_on_ranks(num_ranks, _fit, folder, layout, epochs, resume, saved_as)
    assert all(losses == pytest.approx(first, rel=1e-6) for losses in others)
    return first


def _fit(
    folder: Path | None, layout: str | None, epochs: int, resume: Path | None, saved_as: Any = "auto"
) -> list[float]:
    L.seed_everything(1, verbose=False)
    world = torch.distributed.get_world_size() if layout is not None else 1
    strategy: Any = "auto" if layout is None else HybridStrategy(layout, checkpoint_format=saved_as)
    watch = Watch()
    saving = [] if folder is None else [ModelCheckpoint(folder, save_last=True, save_top_k=0)]
    trainer = L.Trainer(
        **{**QUIET, "enable_checkpointing": bool(saving)},
        devices=world,
        strategy=strategy,
        max_epochs=epochs,
        callbacks=[watch, *saving],
    )
    ranks = strategy.num_data_ranks if layout is not None else 1
    trainer.fit(models.Tied(), DataLoader(samples(), batch_size=8 // ranks), ckpt_path=resume)
    return watch.losses


class Functional(models.Classifier):
    """No module returns what the next one takes: nothing to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(models.WIDTH, models.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.net.weight, self.net.bias)


class Manual(models.Classifier):
    """Calls no manual_backward."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Functional, {}, r"1F1B needs 2 stages, so 1 cuts, and there are 0"),
        (models.Classifier, {"pipeline_cuts": ["net.blocks.7"]}, r"names 'net.blocks.7', which the step does not call"),
        (Manual, {}, "calls manual_backward 0 times"),
        (models.Classifier, {"pipeline_cuts": ["net.blocks.0", "net.blocks.1"]}, "names 2 of the 1 cuts"),
        (
            models.Classifier,
            {"num_microbatches": 2, "pipeline_schedule": "DualPipeV"},
            "can't run num_microbatches=2",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_on_every_rank(module: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RankError, match=message) as error:
        run_on_ranks(2, _refused, module, options)
    assert "rank 0" in str(error.value)
    assert "rank 1" in str(error.value)


def _refused(module: Any, options: dict[str, Any]) -> None:
    trainer = L.Trainer(**QUIET, devices=2, strategy=HybridStrategy("pp=2", **options), max_epochs=1)
    trainer.fit(module(), DataLoader(samples(), batch_size=8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_schedule": "1f1c"}, "did you mean '1F1B'"),
        ({"num_microbatches": 0}, "must be a number of at least 1"),
        ({"pipeline_cuts": "net"}, "must be a list of names"),
    ],
)
def test_wrong_settings_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HybridStrategy("pp=2", **options)


@pytest.mark.slow
def test_twenty_steps_on_three_axes_equal_one_process() -> None:
    pool = RankPool(8)
    run = RUNS["language_model"]
    try:
        one, records = one_process(run), pool.run(8, train, run, "pp=2,dp_shard=2,tp=2", timeout=900)
    finally:
        pool.close()
    for record in records:
        assert_equal(one, record)


@pytest.mark.parametrize(
    ("module", "own"),
    [(models.Classifier, {}), (models.Tied, {"all-reduce": 1})],
)
def test_a_step_sends_what_crosses_and_no_more(module: Any, own: dict[str, int]) -> None:
    """For each microbatch an activation on and a gradient back; the loss, and whether all went well; the norm."""
    (first, first_bytes), (last, last_bytes) = run_on_ranks(2, _counted, module)
    fixed = {"all-reduce": 2 + own.get("all-reduce", 0)}
    assert first == last == {**fixed, "send": 4, "receive": 4}
    activation = 2 * models.WIDTH * 4
    assert first_bytes["send"] == last_bytes["send"] == 4 * activation


def _counted(module: Any) -> tuple[dict[str, int], dict[str, int]]:
    seen = StepCollectives()
    strategy = HybridStrategy("pp=2", num_microbatches=4, pipeline_cuts=["net.blocks.1"])
    trainer = L.Trainer(
        **QUIET, devices=2, strategy=strategy, max_steps=4, gradient_clip_val=0.1, callbacks=[seen], log_every_n_steps=1
    )
    trainer.fit(module(), DataLoader(samples(), batch_size=8))
    return dict(seen.batches[-2].count), dict(seen.batches[-2].num_bytes)


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        ("pp=2", "32-true"),
        slow("pp=2,dp_shard=2", "64-true"),
        slow("pp=2", "64-true"),
        slow("pp=2,dp_shard=2", "32-true"),
    ],
)
def test_a_module_that_was_cut_goes_on_in_later_runs(layout: str, precision: str) -> None:
    one = once(_one_run_after_another, None, precision)
    for values in run_on_ranks(4 if "," in layout else 2, _one_run_after_another, layout, precision):
        assert values == pytest.approx(one, rel=1e-5)


def _one_run_after_another(layout: str | None, precision: Any) -> list[float]:
    """What is logged when a module is trained, validated, trained by another Trainer and tested."""
    L.seed_everything(1, verbose=False)
    world = torch.distributed.get_world_size() if layout is not None else 1
    module, logged = models.Grouped(), []
    data = models.wide_samples() if precision == "64-true" else samples()
    few = DataLoader(Subset(data, range(13)), batch_size=4)
    for evaluate in ("validate", "test"):
        strategy: Any = "auto" if layout is None else HybridStrategy(layout)
        trainer = L.Trainer(**QUIET, devices=world, strategy=strategy, max_epochs=1, precision=precision)
        ranks = 1 if layout is None else strategy.num_data_ranks
        trainer.fit(module, DataLoader(data, batch_size=8 // ranks))
        values = getattr(trainer, evaluate)(module, few, verbose=False)[0]
        logged += [values[name] for name in sorted(values)]
    return logged


def test_a_deferred_module_that_was_cut_is_refused_elsewhere() -> None:
    with pytest.raises(RankError, match="holds the stages of rank 0 of pp=2"):
        run_on_ranks(2, _elsewhere, models.Deferred, "dp_replicate=2", {})
    with pytest.raises(RankError, match="would cut it elsewhere"):
        run_on_ranks(2, _elsewhere, models.Deferred, "pp=2", {"pipeline_schedule": "ZBVZeroBubble"})
    run_on_ranks(2, _elsewhere, models.Deferred, "pp=2", {"pipeline_schedule": "GPipe"})


def test_a_module_that_was_cut_is_cut_anew_elsewhere() -> None:
    run_on_ranks(2, _elsewhere, models.deep, "dp_replicate=2", {})
    run_on_ranks(2, _elsewhere, models.deep, "pp=2", {"pipeline_schedule": "ZBVZeroBubble"})


def _elsewhere(make: Callable[[], L.LightningModule], layout: str, options: dict[str, Any]) -> None:
    module = make()
    for strategy in (HybridStrategy("pp=2"), HybridStrategy(layout, **options)):
        L.Trainer(**QUIET, devices=2, strategy=strategy, max_steps=1).fit(module, DataLoader(samples(), batch_size=8))


class Recomputing(models.Block):
    """By itself, in the old way of torch: activations inside have no graph."""

    use_reentrant = True

    def __call__(self, *args: Any) -> Tensor:
        return checkpoint(super().__call__, *args, use_reentrant=self.use_reentrant)


class RecomputingLater(Recomputing):
    use_reentrant = False


def recomputing(block: type[nn.Module]) -> L.LightningModule:
    module = models.Momentum()
    module.net.blocks = nn.ModuleList(block() for _ in range(4))  # type: ignore[union-attr]
    return module


def test_blocks_that_recompute_by_themselves_equal_one_process() -> None:
    assert_parity(Run(partial(recomputing, RecomputingLater), samples, few_samples), "pp=2", 2)


def test_cuts_inside_of_reentrant_recomputation_are_refused() -> None:
    options = {"pipeline_cuts": ["net.blocks.1"]}
    with pytest.raises(RankError, match="use_reentrant=False"):
        run_on_ranks(2, _refused, partial(recomputing, Recomputing), options)
    assert_parity(Run(partial(recomputing, Recomputing), samples, few_samples), "pp=2", 2)


class Copy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


class Changing(models.Momentum):
    """A view of what a module returned is changed in place between the blocks, and the whole is used at the end."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.net.stem(x)
        kept = self.net.copy(x)
        for block in self.net.blocks:
            x = block(x)
            kept[:, :4].mul_(0.9)
        return self.net.head(self.net.norm(x + kept))


def changing() -> L.LightningModule:
    module = Changing()
    module.net = models.Net(5)
    module.net.copy = Copy()
    return module


def test_a_view_that_is_changed_between_blocks_is_changed_once() -> None:
    """Cuts between the changes would send the changed tensor, and the later stage would change it again."""
    assert_parity(Run(changing, samples, few_samples), "pp=2", 2)
    with pytest.raises(RankError, match="can't be cut"):
        run_on_ranks(2, _refused, changing, {"pipeline_cuts": ["net.blocks.1"]})


class Summing(models.Tied):
    """Zeroes its gradients every second step only, and steps on what has been added up."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if batch_idx % 2 == 0:
            optimizer.zero_grad()


@pytest.mark.parametrize("layout", ["pp=2", slow("pp=2,dp_replicate=2"), slow("pp=2,dp_shard=2")])
def test_gradients_that_are_kept_over_steps_count_once(layout: str) -> None:
    assert_parity(Run(Summing, samples), layout, 4 if "," in layout else 2)


class UnusedTie(models.Classifier):
    """A tied weight that the loss does not depend on: weight decay must leave it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(models.WIDTH, 4), nn.Linear(models.WIDTH, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0 * self.first(x).detach().sum()
        x = self.net(x)
        return x + 0 * self.second(x.repeat(1, 4)).detach()


def test_a_tied_weight_without_gradient_stays_without() -> None:
    assert_parity(Run(UnusedTie, samples), "pp=2", 2)


class TwoLoaders(models.Classifier):
    """Takes another way through the network for each validation loader; their batches have the same shape."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x = self.net.stem(batch[0])
        blocks = list(self.net.blocks)
        for block in blocks if dataloader_idx == 0 else [blocks[0], *blocks]:
            x = block(x)
        self.log("val/loss", F.cross_entropy(self.net.head(self.net.norm(x)), batch[1]))


def test_each_loader_takes_its_own_way() -> None:
    one = once(_of_two_loaders, None)
    for values in run_on_ranks(2, _of_two_loaders, "pp=2"):
        assert values == pytest.approx(one, rel=1e-5)


def _of_two_loaders(layout: str | None) -> list[float]:
    L.seed_everything(1, verbose=False)
    strategy: Any = "auto" if layout is None else HybridStrategy(layout, pipeline_cuts=["net.blocks.1"])
    trainer = L.Trainer(**QUIET, devices=1 if layout is None else 2, strategy=strategy, max_epochs=1)
    loaders = [DataLoader(samples(16, seed), batch_size=8) for seed in (3, 4)]
    trainer.fit(TwoLoaders(), DataLoader(samples(), batch_size=8), loaders)
    return [float(v) for name, v in sorted(trainer.callback_metrics.items()) if name.startswith("val")]


class Dropping(models.Classifier):
    """Mixes its samples by random numbers of its own, and drops in every block."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Sequential(models.Block(), nn.Dropout(0.5)) for _ in range(4)), nn.Linear(16, 4))
        self.masks: list[Tensor] = []
        for name, dropout in self.named_modules():
            if isinstance(dropout, nn.Dropout):
                dropout.register_forward_hook(partial(self._note, name))

    def _note(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        if not is_placeholder(output):
            self.masks.append((output == 0).detach())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        order = torch.randperm(len(batch[0]))
        return F.cross_entropy(self(batch[0][order]), batch[1][order])


def test_stages_mix_samples_alike_and_drop_apart() -> None:
    """With labels mixed otherwise than images, the loss of a separable task could not fall."""
    (first, one), (second, other) = run_on_ranks(2, _dropped)
    assert one
    assert other
    assert not any(torch.equal(a, b) for a in one for b in other)
    assert not any(torch.equal(a, b) for i, a in enumerate(one) for b in one[:i])
    assert torch.equal(first, second)


def _dropped() -> tuple[Tensor, list[Tensor]]:
    L.seed_everything(1, verbose=False)
    module = Dropping()
    strategy = HybridStrategy("pp=2", num_microbatches=2, pipeline_schedule="GPipe")
    trainer = L.Trainer(**QUIET, devices=2, strategy=strategy, max_steps=2)
    trainer.fit(module, DataLoader(samples(), batch_size=16))
    return torch.rand(3), module.masks
