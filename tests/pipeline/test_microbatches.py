"""How a batch is split into microbatches, and that their step is that of the whole batch, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_dist import HybridStrategy
from lightning_dist.parallel.pipeline.batch_split import EACH, Splitter
from lightning_dist.parallel.rehearsal import FixedNumbers, undone
from tests.support.models import Classifier, samples
from tests.support.parity import QUIET
from tests.support.ranks import RankError, run_on_ranks

pytestmark = pytest.mark.sampled

WIDTH, IGNORED = 8, -100


def _sizes(value: Any) -> Any:
    if isinstance(value, (Tensor, np.ndarray)):
        return list(value.shape)
    if isinstance(value, dict):
        return {key: _sizes(item) for key, item in value.items()}
    return [_sizes(item) for item in value] if isinstance(value, (list, tuple)) else value


IMAGES = [torch.zeros(3, 4 + i, 4) for i in range(4)]
BOXES = [{"boxes": torch.zeros(i, 4)} for i in range(4)]


@pytest.mark.parametrize(
    ("batch", "how", "first"),
    [
        ([torch.zeros(4, 2), torch.zeros(4)], None, [[2, 2], [2]]),
        ([torch.zeros(4, 2), ["a", "b", "c", "d"]], None, [[2, 2], ["a", "b"]]),
        ([torch.zeros(4, 2), np.zeros((4, 3))], None, [[2, 2], [2, 3]]),
        ([torch.zeros(4, 2), torch.zeros(7)], None, [[2, 2], [7]]),
        ((torch.zeros(4, 3, 5, 5), BOXES), None, [[2, 3, 5, 5], [{"boxes": [0, 4]}, {"boxes": [1, 4]}]]),
        ((IMAGES, BOXES), None, [[[3, 4, 4], [3, 5, 4]], [{"boxes": [0, 4]}, {"boxes": [1, 4]}]]),
        ([[torch.zeros(4, 2), torch.zeros(4, 2)], torch.zeros(4)], None, [[[2, 2], [2, 2]], [2]]),
        ({"x": torch.zeros(6, 4), "y": torch.zeros(4)}, {"x": 1, "y": 0}, {"x": [6, 2], "y": [2]}),
        ({"x": torch.zeros(4, 2), "weights": torch.zeros(4)}, {"x": 0, "weights": None}, {"x": [2, 2], "weights": [4]}),
        ([[torch.zeros(3, 2)] * 4, torch.zeros(4)], [EACH, 0], [[[3, 2], [3, 2]], [2]]),
        (torch.zeros(5, 4, 2), 1, [5, 2, 2]),
        ([torch.zeros(4, 2)], lambda batch, n: [[part] for part in batch[0].chunk(n)], [[2, 2]]),
    ],
)
def test_batches_are_split_along_their_samples(batch: Any, how: Any, first: Any) -> None:
    splitter = Splitter(how)
    parts, sizes = splitter.split(batch, 2)
    assert _sizes(parts[0]) == first
    assert len(parts) == len(sizes) == 2
    assert sum(sizes) == 4


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"z": 0}, "batch_split names .'z'., and the batch has"),
        ({"x": 0, "y": 1}, "finds different numbers of samples"),
        ({"x": None}, "says of no part of a batch"),
        ([0, 0], "where the batch has a dict"),
    ],
)
def test_a_wrong_batch_split_is_told(how: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Splitter(how).split({"x": torch.zeros(4, 2), "y": torch.zeros(4, 3)}, 2)


def test_fixed_numbers_do_not_depend_on_how_many_are_drawn() -> None:
    def drawn(size: int) -> list[Tensor]:
        torch.manual_seed(size)
        x = torch.ones(size, 3)
        normal = torch.normal(torch.full((size,), 2.0), 0.5)
        return [
            torch.rand(size),
            torch.randn_like(x)[:, 0],
            F.dropout(x, 0.3)[:, 0],
            torch.bernoulli(torch.full((size,), 0.2)),
            torch.randint(3, 9, (size,)),
            normal,
            torch.multinomial(torch.tensor([0.1, 0.7, 0.2]).expand(size, 3), 1)[:, 0],
        ]

    with FixedNumbers():
        for few, many in zip(drawn(3), drawn(30), strict=True):
            assert torch.equal(few, many[:3])
        assert torch.randperm(4).tolist() == [0, 1, 2, 3]
    assert not torch.equal(torch.rand(3), torch.rand(3))


def test_what_a_module_changes_is_undone() -> None:
    module = nn.BatchNorm1d(2)
    module.seen, module.count = [], 0  # type: ignore[assignment]
    with undone(module):
        module(torch.randn(4, 2))
        module.seen.append(1)  # type: ignore[operator, union-attr]
        module.count, module.new = 3, torch.zeros(1)  # type: ignore[assignment]
    assert module.running_mean is not None
    assert module.running_mean.tolist() == [0, 0]
    assert (module.seen, module.count, hasattr(module, "new")) == ([], 0, False)


# ---------------------------------------------------------------- steps that are no mean over samples


class Samples(Dataset):  # type: ignore[type-arg]
    def __init__(self, ignored: int = 0) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(32, WIDTH, generator=generator)
        self.y = (self.x.sum(1) > 0).long()
        self.y[torch.randperm(32, generator=generator)[:ignored]] = IGNORED

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index]


class Plain(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
        self.losses: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.5)


class Summed(Plain):
    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="sum")


class Contrasted(Plain):
    def loss(self, batch: Any) -> Tensor:
        z = F.normalize(self.net(batch[0]), dim=1)
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))


class Flipped(Plain):
    def loss(self, batch: Any) -> Tensor:
        mixed = self.net(0.7 * batch[0] + 0.3 * batch[0].flip(0))
        return 0.7 * F.cross_entropy(mixed, batch[1]) + 0.3 * F.cross_entropy(mixed, batch[1].flip(0))


class LogsSum(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("total", loss * len(batch[1]))
        return loss


class Noisy(Plain):
    """Random, and all the same a mean over samples."""

    def loss(self, batch: Any) -> Tensor:
        x = F.dropout(batch[0] + 0.1 * torch.randn_like(batch[0]), 0.2)
        return F.cross_entropy(self.net(x), batch[1])


class TimeFirst(Plain):
    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch["x"]).mean(0), batch["y"])


def _time_first(samples: list[Any]) -> dict[str, Tensor]:
    x = torch.stack([x for x, _ in samples])
    return {"x": torch.stack([x, 2 * x, x.sin()]), "y": torch.tensor([int(y) for _, y in samples])}


def _losses(
    kind: Callable[[], Plain], layout: str | None, ignored: int = 0, collate: Any = None, **options: Any
) -> list[float]:
    module = kind()
    strategy: Any = "auto" if layout is None else HybridStrategy(layout, **options)
    trainer = L.Trainer(**QUIET, devices=1 if layout is None else 2, max_epochs=1, strategy=strategy)
    trainer.fit(module, DataLoader(Samples(ignored), batch_size=8, collate_fn=collate))
    return module.losses


def _expect(kind: Callable[[], Plain], *args: Any, **options: Any) -> None:
    expected = _losses(kind, None, *args)
    for losses in run_on_ranks(2, _on_pipeline, kind, args, options):
        assert losses == pytest.approx(expected, rel=1e-5)


def _on_pipeline(kind: Callable[[], Plain], args: tuple[Any, ...], options: dict[str, Any]) -> list[float]:
    return _losses(kind, "pp=2", *args, **options)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (Summed, "what it returns is"),
        (Contrasted, "what it returns is"),
        (Flipped, "what it returns is"),
        (LogsSum, "the logged 'total' is"),
    ],
)
def test_a_step_that_is_no_mean_over_samples_is_refused_on_all_ranks(kind: type[Plain], what: str) -> None:
    with pytest.raises(RankError, match=f"training_step over 4 microbatches gives other numbers .*: {what}") as raised:
        run_on_ranks(2, _on_pipeline, kind, (), {})
    assert str(raised.value).count("ValueError: pp: training_step over") == 2


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B", "Interleaved1F1B"])
@pytest.mark.parametrize("kind", [Summed, Contrasted, Flipped])
def test_one_microbatch_is_the_whole_batch(kind: type[Plain], schedule: str) -> None:
    _expect(kind, num_microbatches=1, pipeline_schedule=schedule)


def test_a_random_step_is_not_refused() -> None:
    first, second = run_on_ranks(2, _on_pipeline, Noisy, (), {})
    assert first == second


def test_the_comparison_can_be_left_out() -> None:
    run_on_ranks(2, _on_pipeline, Summed, (), {"pipeline_check": False})


def _labels(part: Any) -> Tensor:
    return (part[1] != IGNORED).sum()


def test_labels_that_are_ignored_need_a_weight() -> None:
    with pytest.raises(RankError, match=r"what it returns is nan / .* or with microbatch_weight="):
        run_on_ranks(2, _on_pipeline, Plain, (12,), {"num_microbatches": 8})
    _expect(Plain, 12, microbatch_weight=_labels)


def test_batches_with_time_first_are_split_where_the_user_says() -> None:
    with pytest.raises(RankError, match="batch_split"):
        run_on_ranks(
            2, _on_pipeline, TimeFirst, (0, _time_first), {"num_microbatches": 3, "pipeline_schedule": "GPipe"}
        )
    _expect(TimeFirst, 0, _time_first, batch_split={"x": 1, "y": 0})


class Draws(Classifier):
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0] + torch.randn(batch[0].shape))


def _predict_twice() -> list[list[Tensor]]:
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(**QUIET, devices=2, strategy=HybridStrategy("pp=2"))
    module, loader = Draws(), DataLoader(samples(8), batch_size=4)
    return [trainer.predict(module, loader) for _ in range(2)]  # type: ignore[misc]


def test_predictions_that_draw_do_so_apart_each_time() -> None:
    """As where a dropout that stays on is to tell how sure a model is."""
    first, second = run_on_ranks(2, _predict_twice)[0]
    assert not any(torch.equal(one, other) for one, other in zip(first, second, strict=True))
