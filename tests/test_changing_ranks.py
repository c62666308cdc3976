"""A run that goes on with other ranks than it began with takes the same steps."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler

from lightning_dist import HybridStrategy, Layout
from lightning_dist.elastic import attempt
from lightning_dist.elastic.adapt import adapted_layout
from tests.support import models
from tests.support.parity import QUIET, Watch, once, whole_weights
from tests.support.ranks import RankError, run_on_ranks

DIVIDED = {"tensor_plan": {"net.blocks.*.up": "colwise", "net.blocks.*.down": "rowwise"}}


class Numbered(Dataset):
    """Samples with their number."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index)
        return torch.randn(models.WIDTH, generator=generator).double(), torch.tensor(index % models.CLASSES), index


class Stream(Numbered, IterableDataset):
    """The same on every rank."""

    def __iter__(self) -> Any:
        return (self[index] for index in range(self.size))


@dataclass(frozen=True)
class Run:
    """A training of three epochs.

    Args:
        layout: of ``ranks`` that it begins with.
        batch_size, accumulate: of these.
        scheduling: of a GradientAccumulationScheduler, in place of ``accumulate``.
        data: "shuffled", "batches" (the user's batch sampler), "stream" or "dealt" (by the user).
        manual: manual optimization.
        every: the frequency of the schedule, in batches.
        saves: after which "batch" of a step, or "validation".
        trainer, strategy: more arguments of them.
    """

    layout: str
    ranks: int = 4
    size: int = 43
    batch_size: int = 3
    accumulate: int = 2
    scheduling: dict[int, int] = field(default_factory=dict)
    data: str = "shuffled"
    drop_last: bool = False
    manual: bool = False
    every: int = 1
    saves: str = "batch"
    trainer: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(repr(self))

    def loader(self, trainer: L.Trainer) -> DataLoader:
        size, data = self.batch_size, Numbered(self.size)
        if self.data == "batches":
            return DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), size, self.drop_last))
        if self.data == "stream":
            return DataLoader(Stream(self.size), batch_size=size)
        if self.data == "dealt":
            strategy: Any = trainer.strategy
            sampler = DistributedSampler(data, strategy.ranks.layout.num_data_ranks, strategy.ranks.rank)
            return DataLoader(data, batch_size=size, sampler=sampler)
        return DataLoader(data, batch_size=size, shuffle=True, drop_last=self.drop_last)


class Module(models.Classifier):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.double()  # before a checkpoint is loaded, which Lightning does first (seen in 2.6.6)
        self.run, self.automatic_optimization = run, not run.manual

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        if self.run.manual:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches) if not self.run.scheduling else 20
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=max(steps, 1))
        return [optimizer], [{"scheduler": schedule, "interval": "step", "frequency": self.run.every}]


class Cut(Exception):
    """Ends a part of a run."""


class Steps(Watch):
    """Notes of each optimizer step its samples, loss, learning rate; after some, saves and stops."""

    def __init__(self, run: Run, path: Path | None, stops_after: int) -> None:
        super().__init__()
        self.run, self.path, self.stops_after, self.done = run, path, stops_after, 0
        self.samples: list[list[int]] = [[]]
        self.steps: list[tuple[float, ...]] = []
        self.losses: list[float] = []
        self.validated: list[int] = []

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.done = trainer.global_step

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.steps.append((optimizer.param_groups[0]["lr"],))

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.validated.append(trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._cut(trainer, "validation")

    def _cut(self, trainer: L.Trainer, where: str) -> None:
        if self.done == self.stops_after and self.path is not None and self.run.saves == where:
            trainer.save_checkpoint(self.path)
            raise Cut

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.samples[-1] += batch[2].tolist()
        if trainer.global_step == self.done:
            return
        self.done = trainer.global_step
        self.samples.append([])
        self._cut(trainer, "batch")


def fit(run: Run, folder: Path, resumes: str | None, saves: str | None, after: int) -> Any:
    """By optimizer step of this part: samples of this rank, learning rate, norm; after which it validated; weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(attempt.DIRECTORY, str(folder))
        patch.setenv(attempt.FIRST_RANKS, str(run.ranks))
        L.seed_everything(1, verbose=False)
        world = torch.distributed.get_world_size()
        steps = Steps(run, None if saves is None else folder / saves, after)
        scheduler: list[Callback] = [GradientAccumulationScheduler(dict(run.scheduling))] if run.scheduling else []
        accumulate = 1 if run.scheduling or run.manual else run.accumulate
        trainer = L.Trainer(
            **{**QUIET, "max_epochs": 3, "devices": world, "num_sanity_val_steps": 0, **run.trainer},
            strategy=HybridStrategy(run.layout, **run.strategy),
            precision="64-true",
            gradient_clip_val=None if run.manual else 0.05,
            accumulate_grad_batches=accumulate,
            callbacks=[steps, *scheduler],
        )
        module = Module(run)
        validation = DataLoader(Numbered(4), batch_size=1)
        path = None if resumes is None else folder / resumes
        with contextlib.suppress(Cut):
            trainer.fit(module, run.loader(trainer), validation, ckpt_path=path)
        assert trainer.accumulate_grad_batches == accumulate or scheduler
        samples = (trainer.strategy.data_rank, steps.samples[:-1])  # type: ignore[attr-defined]
        return samples, steps.steps, steps.norms(), steps.validated, {} if saves else whole_weights(module)


@dataclass
class Seen:
    samples: list[list[int]]
    rates: list[Any]
    norms: list[float]
    validated: list[int]
    weights: dict[str, Tensor]


def joined(parts: list[list[Any]]) -> Seen:
    """What runs on some ranks, one after the other, saw together; of ranks with the same samples, one counts."""
    samples: list[list[int]] = []
    for of_ranks in parts:
        by_data_rank = dict(samples for samples, *_ in of_ranks)
        samples += [sorted(itertools.chain(*step)) for step in zip(*by_data_rank.values(), strict=True)]
    firsts = [of_ranks[0] for of_ranks in parts]
    rates, norms, validated = (list(itertools.chain(*(first[i] for first in firsts))) for i in (1, 2, 3))
    return Seen(samples, rates, norms, validated, firsts[-1][4])


def uninterrupted(run: Run) -> Seen:
    with tempfile.TemporaryDirectory() as folder:
        return joined([run_on_ranks(run.ranks, fit, run, Path(folder), None, None, -1)])


def on_changing_ranks(run: Run, folder: Path, ranks: tuple[int, ...], cuts: tuple[int, ...]) -> Seen:
    """Goes on after each of the cuts, in optimizer steps, with the next number of ranks."""
    names = [None, *(f"{number}.ckpt" for number in range(len(cuts))), None]
    parts = [
        run_on_ranks(number, fit, run, folder, resumes, saves, cut)
        for number, cut, (resumes, saves) in zip(ranks, (*cuts, -1), itertools.pairwise(names), strict=True)
    ]
    return joined(parts)


def assert_same(run: Run, folder: Path, ranks: tuple[int, ...], cuts: tuple[int, ...]) -> None:
    whole, parts = once(uninterrupted, run), on_changing_ranks(run, folder, ranks, cuts)
    assert len(whole.samples) > cuts[-1]
    assert parts.samples == whole.samples
    assert parts.validated == whole.validated
    torch.testing.assert_close(torch.tensor(parts.rates), torch.tensor(whole.rates), rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.norms, whole.norms, rtol=1e-9, atol=1e-12)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], weight, rtol=1e-9, atol=1e-12)


TWO = {"layout": "dp_replicate=2", "ranks": 2}
THIRD = {"val_check_interval": 3}
CASES = [
    pytest.param(Run("dp_replicate=4"), (4, 2, 4), (1, 3), id="replicate"),
    pytest.param(Run("dp_replicate=4", saves="validation"), (4, 2, 4), (2, 4), id="saved-by-validation"),
    pytest.param(Run("dp_replicate=4", trainer={"limit_val_batches": 0}), (4, 2, 4), (2, 4), id="ends-of-epochs"),
    pytest.param(Run("dp_shard=4", drop_last=True, size=42), (4, 2, 4), (1, 3), id="shard-drop-last"),
    pytest.param(Run(**TWO, batch_size=4, drop_last=True, size=45), (2, 4, 2), (1, 4), id="more-that-drop-last"),
    pytest.param(Run("dp_replicate=2,tp=2", size=45, strategy=DIVIDED), (4, 2, 4), (1, 5), id="replicate-tp"),
    pytest.param(Run("pp=2,dp_replicate=2", size=41), (4, 2, 4), (3, 5), id="pp-replicate"),
    pytest.param(Run("dp_replicate=4", accumulate=1, size=36), (4, 3, 1, 4), (2, 4, 8), id="other-batch-size"),
    pytest.param(Run(**TWO, size=40), (2, 4, 2), (2, 7), id="more-than-at-first"),
    pytest.param(Run(**TWO, size=40, strategy={"replay_every_n_steps": 1}), (2, 4, 2), (2, 7), id="computed-twice"),
    pytest.param(Run("dp_shard=2", ranks=2, scheduling={0: 2, 1: 4}), (2, 1, 2), (1, 7), id="scheduled"),
    pytest.param(Run("dp_replicate=4", manual=True, size=48), (4, 2, 4), (1, 5), id="manual"),
    pytest.param(Run(**TWO, data="batches", size=41), (2, 1, 2), (3, 6), id="batch-sampler"),
    pytest.param(Run(**TWO, data="dealt", size=44), (2, 1, 2), (3, 6), id="dealt-by-the-user"),
    pytest.param(Run(**TWO, data="stream", size=48), (2, 1, 2), (3, 6), id="stream"),
    pytest.param(
        Run(**TWO, every=4, trainer={**THIRD, "limit_train_batches": 6}), (2, 1, 2), (2, 5), id="counts-of-batches"
    ),
    pytest.param(
        Run(**TWO, size=48, trainer={**THIRD, "check_val_every_n_epoch": None}),
        (2, 1, 2),
        (2, 8),
        id="validation-across-epochs",
    ),
    pytest.param(Run(**TWO, size=42, trainer={"val_check_interval": 0.5}), (2, 1, 2), (2, 8), id="share-of-an-epoch"),
]
ON_DEMAND = (
    "saved-by-validation",
    "ends-of-epochs",
    "computed-twice",
    "shard-drop-last",
    "pp-replicate",
    "replicate-tp",
    "manual",
    "stream",
    "batch-sampler",
    "share-of-an-epoch",
)


@pytest.mark.parametrize(
    ("run", "ranks", "cuts"),
    [pytest.param(*c.values, id=c.id, marks=[pytest.mark.slow] if c.id in ON_DEMAND else []) for c in CASES],
)
def test_the_steps_are_the_same_on_other_ranks(
    run: Run, ranks: tuple[int, ...], cuts: tuple[int, ...], tmp_path: Path
) -> None:
    assert_same(run, tmp_path, ranks, cuts)


@pytest.mark.parametrize(
    ("run", "ranks", "told"),
    [
        (Run("dp_replicate=4", accumulate=1, batch_size=1), 3, "a step's batch was 4 items .* 1, 2, 4 can"),
        (Run("dp_replicate=2", ranks=2, accumulate=1, data="dealt"), 4, "the loader makes itself; 1, 2 can"),
        (Run("dp_replicate=2", ranks=2, trainer={"limit_train_batches": 3}), 4, "choose a multiple of 2 batches"),
        (Run("dp_replicate=2", ranks=2, drop_last=True, size=33), 4, "5 batches of 6 items.* 1, 2, 3, 6 can"),
        (Run("dp_replicate=1,tp=2", ranks=2), 3, "need a multiple of 2 ranks"),
    ],
)
def test_what_can_not_be_kept_is_refused_on_all_ranks(run: Run, ranks: int, told: str, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=told) as error:
        run_on_ranks(ranks, fit, run, tmp_path, None, None, -1)
    assert str(error.value).count("ValueError: ") >= ranks


ADAPTED = [
    ("dp_replicate=4", 4, 2, "dp_replicate=2"),
    ("dp_replicate=2,dp_shard=2", 4, 2, "dp_shard=2"),
    ("dp_replicate=2,dp_shard=4", 8, 6, "dp_shard=6"),
    ("dp_replicate=2,dp_shard=4", 8, 12, "dp_replicate=3,dp_shard=4"),
    ("dp_shard=4", 4, 3, "dp_shard=3"),
    ("dp_replicate=2,tp=2", 4, 2, "tp=2"),
    ("pp=2,tp=2", 4, 8, "pp=2,dp_replicate=2,tp=2"),
    ("dp_shard=2,dp_replicate=-1", 4, 3, "dp_shard=3"),
    ("dp_replicate=2,tp=-1", 4, 6, "dp_replicate=2,tp=3"),
]


@pytest.mark.parametrize(("asked", "first", "now", "adapted"), ADAPTED)
def test_data_axes_change_and_model_axes_stay(asked: str, first: int, now: int, adapted: str) -> None:
    layout = Layout.parse(asked)
    assert layout is not None
    assert str(adapted_layout(layout, first, now)) == adapted


def test_fallback_layouts_are_tried_in_their_order() -> None:
    fallbacks = Layout.parse_all(["dp_replicate=2", "tp=2,dp_replicate=-1"])
    for num_ranks, fits in ((2, "dp_replicate=2"), (6, "dp_replicate=3,tp=2"), (4, "tp=4")):
        assert str(adapted_layout(Layout(tp=4), 4, num_ranks, fallbacks)) == fits
    with pytest.raises(ValueError, match=r"what does: 4, 2, multiples of 2 ranks"):
        adapted_layout(Layout(tp=4), 4, 3, fallbacks)
    with pytest.raises(ValueError, match="which fits any number of ranks"):
        HybridStrategy("tp=4", fallback_layouts=["auto"])


def test_a_layout_that_does_not_fit_is_refused_where_the_number_of_ranks_is_that_of_the_first_attempt(
    tmp_path: Path,
) -> None:
    with pytest.raises(RankError, match="layout dp_replicate=4 needs 4 ranks, but there are 2"):
        run_on_ranks(2, fit, Run("dp_replicate=4", ranks=2), tmp_path, None, None, -1)
