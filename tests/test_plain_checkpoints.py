"""Plain Lightning and ours read each other's checkpoints, of any moment of a training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_dist import HybridStrategy
from tests.support.models import Words, words
from tests.support.parity import QUIET, Watch, slow, whole_weights
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

LAYOUTS = {"dp_shard=1": 1, "dp_replicate=2": 2, "dp_shard=2": 2, "pp=2": 2}
STEPS = 6
"""Of an epoch."""


class Places(DataLoader):
    """A loader that knows its place; a list of batches, which it takes anew each epoch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.place = self.start = 0

    def __iter__(self) -> Any:
        start, self.start = self.start, 0
        for number, batch in enumerate(super().__iter__()):
            self.place = number + 1
            if number >= start:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["place"]


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([words()[index] for index in range(48)])


def loader(kind: str, ranks: int, rank: int = 0) -> Any:
    size = 8 // ranks
    if kind == "own place":
        return Places(words(), batch_size=size)
    if kind == "stream":
        return DataLoader(Stream(), batch_size=size)
    if kind == "epochs":
        return DataLoader(words(), size, sampler=DistributedSampler(words(), num_replicas=ranks, rank=rank))
    return DataLoader(words(), batch_size=size, shuffle=kind == "shuffled")


class Saves(Callback):
    """At some moment of the second epoch."""

    def __init__(self, path: Path | None, moment: str, step: int) -> None:
        self.path, self.moment, self.step = path, moment, step

    def save(self, moment: str, trainer: L.Trainer) -> None:
        if self.path is not None and moment == self.moment and trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.save("batch start", trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.save("batch end", trainer)

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.save("validation", trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.save("epoch end", trainer)


class Seen(Words):
    """Notes the words of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []

    def training_step(self, batch: Any) -> Any:
        self.seen.append(batch[0].tolist())
        return super().training_step(batch)

    def validation_step(self, batch: Any) -> None:
        self.log("val", super().training_step(batch))


def fit(
    layout: str | None,
    kind: str,
    ckpt: Path | None = None,
    saves: tuple[Path | None, str, int] = (None, "", 0),
    **arguments: Any,
) -> Any:
    L.seed_everything(1, verbose=False)
    world = dist.get_world_size() if dist.is_initialized() else 1
    strategy: Any = "auto" if layout is None else HybridStrategy(layout, checkpoint_format="single")
    ranks = 1 if layout is None else strategy.ranks.requested.resolve(world).num_data_ranks
    watch, module = Watch(), Seen()
    trainer = L.Trainer(
        **QUIET,
        devices=world,
        strategy=strategy,
        max_epochs=3,
        callbacks=[watch, Saves(*saves)],
        num_sanity_val_steps=0,
        **arguments,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(
            module,
            loader(kind, ranks, trainer.global_rank if ranks > 1 else 0),
            DataLoader(words(), batch_size=8),
            ckpt_path=ckpt,
        )
    told = " ".join(str(one.message) for one in caught)
    return watch.losses, whole_weights(module), module.seen, trainer.global_step, told


def on(layout: str | None, *args: Any) -> Any:
    if layout is None or LAYOUTS[layout] == 1:
        return fit(layout, *args)
    return run_on_ranks(LAYOUTS[layout], fit, layout, *args)[0]


MOMENTS = [("batch start", 9), ("batch end", 9), ("validation", 12), ("epoch end", 12)]


KINDS = ["in order", "own place", "stream", "epochs"]
QUICK = [("dp_shard=1", "batch end", 9, kind) for kind in KINDS] + [
    ("dp_shard=1", "batch start", 9, "in order"),
    ("dp_shard=1", "validation", 12, "own place"),
    ("dp_shard=1", "epoch end", 12, "stream"),
    ("dp_replicate=2", "batch end", 9, "in order"),
    ("dp_shard=2", "batch end", 9, "stream"),
]
CASES = [(layout, *moment, kind) for layout in LAYOUTS for moment in MOMENTS for kind in KINDS]


@pytest.mark.parametrize(
    ("layout", "moment", "step", "kind"), [case if case in QUICK else slow(*case) for case in CASES]
)
def test_ours_goes_on_after_what_plain_lightning_has_done(
    layout: str, moment: str, step: int, kind: str, tmp_path: Path
) -> None:
    if kind in ("own place", "epochs") and LAYOUTS[layout] > 1 and "pp" not in layout:
        kind = "in order" if kind == "own place" else kind
    expected = fit(None, kind, None, (tmp_path / "plain.ckpt", moment, step))
    found = on(layout, kind, tmp_path / "plain.ckpt")
    if (kind, moment) == ("own place", "batch start"):
        # a loader that has been asked for the next batch says so, and plain Lightning leaves that one out
        expected = fit(None, kind, tmp_path / "plain.ckpt")
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
        return
    assert len(found[0]) == 3 * STEPS - step
    assert found[3] == 3 * STEPS
    if LAYOUTS[layout] == 1:
        assert found[2] == expected[2][step:]
    if kind != "epochs" or LAYOUTS[layout] == 1:
        torch.testing.assert_close(found[0], expected[0][step:], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)
    assert "begins anew" not in found[4]


@pytest.mark.parametrize("moment", ["batch start", "batch end"])
@pytest.mark.parametrize("layout", ["dp_shard=1", slow("dp_replicate=2"), "dp_shard=2", slow("pp=2")])
def test_an_epoch_whose_order_is_gone_begins_anew_with_a_word(layout: str, moment: str, tmp_path: Path) -> None:
    fit(None, "shuffled", None, (tmp_path / "plain.ckpt", moment, 9))
    losses, _, seen, steps, told = on(layout, "shuffled", tmp_path / "plain.ckpt")
    assert "after 3 batches of epoch 1" in told
    assert "begins anew" in told
    assert len(losses) == 2 * STEPS, "the epoch was not taken whole"
    assert steps == 9 + 2 * STEPS
    if LAYOUTS[layout] == 1:
        first = sorted(word for step in seen[:STEPS] for word in step)
        assert first == sorted(words()[index][0].item() for index in range(48))


@pytest.mark.parametrize(
    ("layout", "moment", "step", "kind"),
    [case if case in QUICK else slow(*case) for case in CASES if case[3] in ("in order", "own place")],
)
def test_plain_lightning_goes_on_after_what_ours_has_done(
    layout: str, moment: str, step: int, kind: str, tmp_path: Path
) -> None:
    """As it does from a checkpoint of its own: where the loader has no place, with the first samples."""
    if LAYOUTS[layout] > 1 and "pp" not in layout:
        kind = "in order"
    fit(None, kind, None, (tmp_path / "plain.ckpt", moment, step))
    on(layout, kind, None, (tmp_path / "ours.ckpt", moment, step))
    expected = fit(None, kind, tmp_path / "plain.ckpt")
    found = fit(None, kind, tmp_path / "ours.ckpt")
    assert found[2] == expected[2]
    assert found[3] == expected[3]
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["dp_shard=1", slow("pp=2")])
def test_ours_goes_on_after_ours_with_a_loader_that_has_a_place(layout: str, tmp_path: Path) -> None:
    expected = fit(None, "own place")
    on(layout, "own place", None, (tmp_path / "ours.ckpt", "batch start", 9))
    found = on(layout, "own place", tmp_path / "ours.ckpt")
    torch.testing.assert_close(found[0], expected[0][9:], rtol=1e-5, atol=1e-6)
