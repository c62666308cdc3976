"""One training of ``verify``, in this process: what is taken out of it, what it leaves, and how a failure is told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_dist.cli import main
from lightning_dist.doctor.results import CheckFailed
from lightning_dist.layout import Layout
from lightning_dist.verify import LayoutResult, training, verification, verify
from lightning_dist.verify.randomness import switch_off_dropout
from lightning_dist.verify.training import Job, Record, Watch, train


class Small(L.LightningModule):
    """Two layers around a norm, on 64 samples, 16 at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, classes = batch
        return F.cross_entropy(self.last(self.norm(self.first(x)).relu()), classes)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.samples(), 16)

    def samples(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        return TensorDataset(torch.randn(64, 8, generator=generator), torch.randint(4, (64,), generator=generator))


class Validated(Small):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def val_dataloader(self) -> DataLoader:
        return self.train_dataloader()


Make = Callable[[], L.LightningModule]


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., Record]:
    def run(make: Make, **options: Any) -> Record:
        return train(replace(Job(make, None, None, 6, 0, "64-true", "cpu", {}, {}, tmp_path), **options))

    return run


def in_this_process(settings: Any, _: Any, job: Job, together: bool) -> list[Record]:
    """In place of ranks, which here are trainings of one process each, with the number of the rank around them."""
    if job.layout is None:
        return [train(job)]
    records = []
    for rank in range(settings.num_ranks):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setenv("TESTS_LAYOUT", str(job.layout))
            records.append(train(replace(job, layout=None)))
    return records


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LayoutResult]:
    """What is found under a layout whose ranks are trainings here."""
    monkeypatch.setattr(verification, "run_ranks", in_this_process)
    monkeypatch.setattr(verification, "_validate_pickled", lambda *_: None)

    def run(make: Make, layout: str = "tp=2", **options: Any) -> LayoutResult:
        return verify(make, None, [layout], accelerator="cpu", **options)[layout]

    return run


def is_under_layout() -> bool:
    return "TESTS_LAYOUT" in os.environ


# ---------------------------------------------------------------- what the module brings


class Brings(Validated):
    def configure_callbacks(self) -> list[Callback]:
        return [ModelCheckpoint(monitor="val_loss"), EarlyStopping("val_loss"), Sees()]


class Sees(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: L.LightningModule, *_: Any) -> None:
        pl_module.log("seen", 1.0)


def test_what_watches_a_validation_or_saves_is_left_out(
    trained: Callable[..., Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere := tmp_path / "of the user").mkdir()
    monkeypatch.chdir(elsewhere)
    record = trained(Brings)
    assert record.notes == {
        "ModelCheckpoint, which the module brings, was left out in both",
        "EarlyStopping, which the module brings, was left out in both",
    }
    assert "seen" in record.logged
    assert list(elsewhere.iterdir()) == []


class WritesWhere(Small):
    def on_train_end(self) -> None:
        (Path(self.trainer.default_root_dir) / "written").touch()


def test_what_is_written_is_in_the_folder_of_the_training(trained: Callable[..., Record], tmp_path: Path) -> None:
    trained(WritesWhere)
    assert (tmp_path / "written").exists()


class Plateau(Validated):
    monitor = "val_loss"

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": self.monitor}}


class PlateauOfTraining(Plateau):
    monitor = "train_loss"

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


def test_a_scheduler_that_watches_the_validation_waits_for_it(trained: Callable[..., Record]) -> None:
    told = "the scheduler that watches val_loss was not stepped in either, as there is no validation in the fit"
    assert trained(Plateau).notes == {told}
    assert trained(PlateauOfTraining).notes == set()


# ---------------------------------------------------------------- how a failure is told


class Floats(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.last(self.norm(self.first(batch[0].float()))), batch[1])


class Shapes(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.cat([batch[0], batch[0].sum(1)], 1).sum()


def test_an_error_of_torch_is_told_with_the_users_line(trained: Callable[..., Record]) -> None:
    with pytest.raises(CheckFailed, match=r"does not train in one process.*test_training.py:\d+, in training_step\)'"):
        trained(Shapes)
    with pytest.raises(
        CheckFailed, match=r"in training_step\); it computes in float64 here, and with --precision 32-true"
    ):
        trained(Floats)
    assert trained(Floats, precision="32-true").losses


class SomeAreNone(Small):
    def train_dataloader(self) -> DataLoader:
        seen: list[Any] = []

        def collate(samples: list[Any]) -> Any:
            seen.append(samples)
            return None if len(seen) == 2 else default_collate(samples)

        return DataLoader(self.samples(), 16, collate_fn=collate)


class SkipsRest(Small):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None


@pytest.mark.parametrize("make", [SomeAreNone, SkipsRest])
def test_batches_that_are_skipped_end_no_training(make: Make, trained: Callable[..., Record]) -> None:
    record = trained(make, steps=4)
    assert len(record.squares) == 4
    assert record.coarsest == torch.float64
    assert torch._C._len_torch_function_stack() == 0  # type: ignore[attr-defined]


def test_a_refusal_comes_before_any_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layout = Layout.parse("dp_shard=2")
    job = Job(Small, None, layout, 1, 0, "64-true", "cpu", {}, {}, tmp_path)

    def refuses(_: Job, watch: Watch, steps: int) -> Record:
        watch.record.squares += [{}] * steps
        Layout.parse("dp=3")
        raise AssertionError

    monkeypatch.setattr(training, "_train", partial(refuses, steps=0))
    with pytest.raises(CheckFailed) as refused:
        train(job)
    assert refused.value.details["refused"]
    monkeypatch.setattr(training, "_train", partial(refuses, steps=1))
    with pytest.raises(ValueError, match="dp"):
        train(job)


class FailsOnJoined(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if len(batch[0]) > 16:
            raise KeyError("of the user")
        return super().training_step(batch, batch_idx)


def test_a_failure_on_the_joined_batches_is_no_refusal(found: Callable[..., LayoutResult]) -> None:
    result = found(FailsOnJoined, "dp_shard=2")
    assert result.status == "failed"
    assert result.sentence.startswith("on the batches of the data ranks, joined: the module does not train")
    assert "KeyError: 'of the user'" in result.sentence


# ---------------------------------------------------------------- batches that are given again


class Divides(Validated):
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        x, classes = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return x / 10, classes


class AsksItsLoader(Divides):
    def on_train_epoch_start(self) -> None:
        assert len(self.trainer.train_dataloader.dataset) == 64
        assert self.trainer.train_dataloader.batch_size == 16

    def on_validation_start(self) -> None:
        assert len(self.trainer.val_dataloaders.dataset) == 64


@pytest.mark.parametrize("make", [Divides, AsksItsLoader])
def test_batches_that_are_given_again_are_transferred_as_they_are(
    make: Make, trained: Callable[..., Record], tmp_path: Path
) -> None:
    own = trained(make, validation_batches=2)
    again = trained(make, batches=own.files["batches"].rename(tmp_path / "given.pt"), validation_batches=2)
    assert again.losses == own.losses
    assert again.validated == own.validated


# ---------------------------------------------------------------- whose fault it is


class OtherRate(Small):
    def configure_optimizers(self) -> Any:
        rate = 1.1e-3 if is_under_layout() else 1e-3
        others = [p for p in self.parameters() if p is not self.norm.weight]
        return torch.optim.AdamW([{"params": others}, {"params": [self.norm.weight], "lr": rate}], 1e-3)


class Shifted(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, classes = batch
        return super().training_step((x - 0.1 if is_under_layout() else x, classes), batch_idx)


def test_a_step_of_the_optimizer_is_told_by_its_first_weight(found: Callable[..., LayoutResult]) -> None:
    result = found(OtherRate)
    assert result.departure is not None
    assert (result.status, result.departure.kind, result.departure.name) == ("differs", "weight", "norm.weight")
    assert result.sentence.startswith("the weights after step 1 depart, though its gradients do not: look at the opt")
    assert "norm.weight (group 2 of 2) has moved by 0.0044" in result.sentence


def test_code_before_the_first_module_is_told(found: Callable[..., LayoutResult]) -> None:
    result = found(Shifted)
    assert result.departure is not None
    assert (result.departure.kind, result.departure.name) == ("input", "first")


class LogsItsRank(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("rank", 1.0 + float(os.environ.get("RANK", 0)))
        return super().training_step(batch, batch_idx)


def test_what_any_rank_logs_is_compared(found: Callable[..., LayoutResult]) -> None:
    result = found(LogsItsRank)
    assert (result.status, result.departure and result.departure.name) == ("differs", "rank")
    assert "is 2 on rank 1, of one process 1" in result.sentence


# ---------------------------------------------------------------- what is asked of the Trainer


def test_arguments_of_the_trainer_are_taken_or_refused(trained: Callable[..., Record]) -> None:
    assert trained(Small, trainer={"accumulate_grad_batches": 2}, steps=2).batch_of == [1, 3]
    for name, told in {
        "max_epochs": "the Trainer's max_epochs is set by verify itself; leave it out of trainer",
        "precision": "the Trainer's precision has an option of its own",
        "clipping": "the Trainer has no 'clipping'",
    }.items():
        with pytest.raises(ValueError, match=told):
            verify(Small, None, ["tp=2"], trainer={name: 1})


def test_the_command_takes_arguments_of_the_trainer(
    found: Callable[..., LayoutResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    what = ["verify", f"{__name__}:Small", "--layouts", "tp=2", "--accelerator", "cpu", "--json", str(tmp_path / "f")]
    assert main([*what, "--trainer", "accumulate_grad_batches=2", "--trainer", "gradient_clip_val=0.1"]) == 0
    (result,) = json.loads((tmp_path / "f").read_text())["results"]
    assert len([name for name in result["values"] if name.startswith("loss")]) == 8
    assert main([*what, "--trainer", "max_steps=2"]) == 2
    assert "the Trainer's max_steps is set by verify itself" in capsys.readouterr().err


PROBABILITIES = "dropout drop_prob attn_drop attention_dropout resid_pdrop encoder_layerdrop drop_rate"
PROBABILITIES += " hidden_dropout_prob dropout_p p_drop proj_drop drop droprate attn_drop_rate drop_p"
OTHERS = " lr_drop drop_weight step_drop lr_drop_rate drop_after dropout_weight drop_every backdrop_scale"


def test_what_is_named_as_a_probability_is_switched_off() -> None:
    layer = nn.Identity()
    vars(layer).update(dict.fromkeys((PROBABILITIES + OTHERS).split(), 0.1))
    assert switch_off_dropout(layer) == {*PROBABILITIES.split()}
    vars(layer).update(dict.fromkeys(PROBABILITIES.split(), 2.0))
    assert not switch_off_dropout(layer)


# ---------------------------------------------------------------- which samples ranks get


class SameStream(Validated):
    """Its ranks here have no part of the data, but all of it."""


class OneBatch(SameStream):
    """Which one process sees again and again too."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*(t[:1].expand(16, *t.shape[1:]) for t in self.samples().tensors)), 16)

    def val_dataloader(self) -> list[Any]:
        return []


def test_ranks_that_are_given_the_same_batches_are_told(found: Callable[..., LayoutResult]) -> None:
    result = found(SameStream, "dp_shard=2", validation_batches=0)
    assert (result.status, result.departure and result.departure.kind) == ("differs", "batch")
    assert result.sentence.startswith(
        "data ranks 0 and 1 are given the same batch in each step, and one process others"
    )
    assert found(SameStream, "tp=2").status == "same"
    assert found(OneBatch, "dp_shard=2", validation_batches=0).status == "same"


def test_ranks_that_all_validate_on_everything_are_told(found: Callable[..., LayoutResult]) -> None:
    result = found(SameStream, "dp_shard=2", steps=1)
    assert "all data ranks are given the same 4 batches of the validation: divide" in result.sentence
