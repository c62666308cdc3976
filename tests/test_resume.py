"""A run resumes under another layout, through the Trainer, and in plain Lightning."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from lightning_dist.checkpoint import convert
from tests.checkpoint.training import damage
from tests.support import models
from tests.support.models import few_samples, samples
from tests.support.parity import QUIET, Watch, slow
from tests.support.ranks import RankError, run_on_ranks

pytestmark = pytest.mark.sampled

RANKS = {None: 1, "dp_shard=1": 1, "dp_replicate=2": 2, "dp_shard=2": 2, "dp_replicate=2,dp_shard=2": 4}
CASES = [
    ("dp_shard=2", "auto", "dp_replicate=2"),
    ("dp_shard=2", "single", None),
    ("dp_replicate=2", "auto", "dp_shard=2"),
    ("dp_replicate=2", "sharded", "dp_shard=1"),
    (None, "auto", "dp_shard=2"),
    slow("dp_replicate=2,dp_shard=2", "auto", "dp_shard=2"),
]


def fit(
    folder: Path,
    layout: str | None,
    epochs: int,
    resume: Path | str | None,
    saved_as: str = "auto",
    kept: int = 0,
    tells: bool = False,
) -> Any:
    """Losses of the epochs that are trained here, and what was warned of; leaves ``last.ckpt`` in the folder."""
    L.seed_everything(1, verbose=False)
    world = dist.get_world_size() if dist.is_initialized() else 1
    strategy: Any = "auto" if layout is None else HybridStrategy(layout, checkpoint_format=saved_as)  # type: ignore[arg-type]
    watch = Watch()
    trainer = L.Trainer(
        **{**QUIET, "enable_checkpointing": True},
        devices=world,
        strategy=strategy,
        max_epochs=epochs,
        gradient_clip_val=0.1,
        callbacks=[watch, ModelCheckpoint(folder, save_last=True, save_top_k=kept, monitor="step", mode="max")],
    )
    loader = DataLoader(samples(), batch_size=8 // world)
    with warnings.catch_warnings(record=True) as caught:
        trainer.fit(models.Grouped(), loader, DataLoader(few_samples(), batch_size=4), ckpt_path=resume)
    return (watch.losses, " ".join(str(one.message) for one in caught)) if tells else watch.losses


def on(layout: str | None, *args: Any) -> Any:
    if RANKS[layout] == 1:
        return fit(*args)
    return run_on_ranks(RANKS[layout], fit, *args)[0]


@pytest.mark.parametrize(("saving", "saved_as", "loading"), CASES)
def test_a_run_goes_on_under_another_layout(
    saving: str | None, saved_as: str, loading: str | None, tmp_path: Path
) -> None:
    whole = fit(tmp_path / "whole", None, 2, None)
    first = on(saving, tmp_path, saving, 1, None, saved_as)
    checkpoint = tmp_path / "last.ckpt"
    sharded = saved_as == "sharded" or (saved_as == "auto" and saving is not None and "shard" in saving)
    assert checkpoint.is_dir() == sharded
    second = on(loading, tmp_path / "second", loading, 2, checkpoint)
    torch.testing.assert_close([*first, *second], whole, rtol=1e-5, atol=1e-6)


def test_a_converted_checkpoint_resumes_in_plain_lightning(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", None, 2, None)
    first = on("dp_shard=2", tmp_path, "dp_shard=2", 1, None)
    convert(tmp_path / "last.ckpt", tmp_path / "single.ckpt")
    torch.testing.assert_close([*first, *fit(tmp_path, None, 2, tmp_path / "single.ckpt")], whole, rtol=1e-5, atol=1e-6)
    assert models.Grouped.load_from_checkpoint(tmp_path / "single.ckpt").net is not None


@pytest.mark.parametrize("layout", ["dp_replicate=2", "dp_shard=2"])
def test_best_weights_are_tested_and_predicted_with(layout: str, tmp_path: Path) -> None:
    for one, other in zip(
        _test_best(tmp_path / "1", "dp_shard=1"), run_on_ranks(2, _test_best, tmp_path / "2", layout)[0], strict=True
    ):
        assert other == pytest.approx(one, rel=1e-5)


def _test_best(folder: Path, layout: str) -> list[float]:
    L.seed_everything(1, verbose=False)
    world = dist.get_world_size() if dist.is_initialized() else 1
    best = ModelCheckpoint(folder, monitor="val/loss")
    trainer = L.Trainer(
        **{**QUIET, "enable_checkpointing": True},
        devices=world,
        strategy=HybridStrategy(layout),
        max_epochs=4,
        callbacks=[best],
    )
    module = models.Plateau()
    validation = DataLoader(few_samples(), batch_size=4)
    trainer.fit(module, DataLoader(samples(), batch_size=8 // world), validation)
    tested = trainer.test(module, validation, ckpt_path="best", verbose=False)[0]
    fresh = trainer.validate(models.Plateau(), validation, ckpt_path=best.best_model_path, verbose=False)[0]
    assert fresh["val/loss"] == pytest.approx(tested["val/loss"], rel=1e-6)
    assert best.best_model_score is not None
    assert float(best.best_model_score) == pytest.approx(tested["val/loss"], rel=1e-6)
    return list(tested.values())


@pytest.mark.parametrize("content", [b"not a checkpoint", b""])
def test_a_foreign_file_is_refused_on_every_rank(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "foreign.ckpt").write_bytes(content)
    with pytest.raises(RankError, match="is no checkpoint, or a damaged one") as error:
        run_on_ranks(2, fit, tmp_path, "dp_shard=2", 1, tmp_path / "foreign.ckpt")
    assert "rank 0" in str(error.value)
    assert "rank 1" in str(error.value)


def test_a_checkpoint_of_another_architecture_is_refused_with_both_shapes(tmp_path: Path) -> None:
    on("dp_shard=2", tmp_path, "dp_shard=2", 1, None)
    with pytest.raises(RankError, match="does not fit Other") as error:
        run_on_ranks(2, _load_other, tmp_path / "last.ckpt")
    assert "[4, 16]" in str(error.value)
    assert "[5, 16]" in str(error.value)


class Other(models.Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net.head = torch.nn.Linear(models.WIDTH, 5)


def _load_other(path: Path) -> None:
    trainer = L.Trainer(**QUIET, devices=2, strategy=HybridStrategy("dp_shard=2"))
    trainer.validate(Other(), DataLoader(few_samples(), batch_size=4), ckpt_path=path, verbose=False)


@pytest.mark.parametrize(
    ("layout", "lost"),
    [("dp_shard=1", "a bit"), slow("dp_shard=1", "a part"), slow("dp_shard=2", "a bit"), ("dp_shard=2", "a part")],
)
def test_last_that_is_damaged_gives_way_to_the_newest_before_it(layout: str, lost: str, tmp_path: Path) -> None:
    on(layout, tmp_path, layout, 3, None, "sharded", 2)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert len(kept) == 3  # the last two, and last.ckpt
    part = max((tmp_path / "last.ckpt").glob("*.distcp"))
    damage(part) if lost == "a bit" else part.unlink()
    (tmp_path / "best.ckpt").symlink_to(tmp_path / "nowhere")
    whole = on(layout, tmp_path / "whole", layout, 5, None, "sharded")
    again, told = on(layout, tmp_path, layout, 5, "last", "sharded", 2, True)
    assert again == whole[len(whole) - len(again) :]
    assert len(again) == len(whole) * 2 // 5  # last.ckpt and the newest before it hold the same
    assert "last.ckpt" in told
    assert "This run goes on from the newest before it" in told
