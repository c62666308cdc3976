"""What else the Trainer promises, under our strategy as under Lightning's own."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.data import DataLoader, SequentialSampler, Subset

from lightning_dist import HybridStrategy
from tests.support.models import Words, words
from tests.support.parity import QUIET, Watch, once, slow, whole_weights
from tests.support.ranks import RankError, run_on_ranks

pytestmark = pytest.mark.sampled

LAYOUTS = {"dp_shard=1": 1, "dp_replicate=2": 2, "dp_shard=2": 2, "tp=2": 2, "pp=2": 2}
EACH = ["dp_shard=1", slow("dp_replicate=2"), "dp_shard=2", slow("tp=2"), slow("pp=2")]


def make(layout: str | None, **arguments: Any) -> tuple[L.Trainer, DataLoader, Watch]:
    world = dist.get_world_size() if dist.is_initialized() else 1
    strategy: Any = "auto" if layout is None else HybridStrategy(layout)
    ranks = 1 if layout is None else strategy.ranks.requested.resolve(world).num_data_ranks
    watch = Watch()
    settings = {**QUIET, "max_epochs": 1, "callbacks": [watch], **arguments}
    return L.Trainer(**settings, devices=world, strategy=strategy), DataLoader(words(), batch_size=8 // ranks), watch


def everywhere(layout: str, function: Any, *args: Any) -> list[Any]:
    """What all ranks have."""
    if LAYOUTS[layout] == 1:
        return [function(layout, *args)]
    return run_on_ranks(LAYOUTS[layout], function, layout, *args)


# ------------------------------------------------------------------ saving


def save_unattached(layout: str | None, path: Path) -> list[str]:
    trainer, _, _ = make(layout)
    torch.manual_seed(1)
    trainer.strategy.connect(Words())
    trainer.save_checkpoint(path)
    again, loader, _ = make(layout, max_epochs=1)
    again.validate(Validated(), loader, ckpt_path=path, verbose=False)
    return sorted(again.strategy.load_checkpoint(path, weights_only=False))


class Validated(Words):
    def validation_step(self, batch: Any) -> None:
        self.log("loss", self.training_step(batch))


@pytest.mark.parametrize("layout", EACH)
def test_a_module_that_no_trainer_has_run_is_saved(layout: str, tmp_path: Path) -> None:
    expected = save_unattached(None, tmp_path / "plain.ckpt")
    for keys in everywhere(layout, save_unattached, tmp_path / "ours.ckpt"):
        assert keys == [key for key in expected if key != "optimizer_states"]


class WithoutOptimizer(Words):
    def configure_optimizers(self) -> None:
        return None


def without_optimizer(layout: str | None, folder: Path) -> Any:
    trainer, loader, _ = make(layout)
    torch.manual_seed(1)
    trainer.fit(WithoutOptimizer(), loader)
    trainer.save_checkpoint(folder / "a.ckpt")
    trainer, loader, watch = make(layout, max_epochs=2)
    trainer.fit(WithoutOptimizer(), loader, ckpt_path=folder / "a.ckpt")
    return watch.losses, trainer.global_step, whole_weights(trainer.lightning_module)


@pytest.mark.parametrize("layout", EACH)
def test_a_module_without_optimizers_is_saved_and_goes_on(layout: str, tmp_path: Path) -> None:
    expected = without_optimizer(None, tmp_path / "plain")
    for found in everywhere(layout, without_optimizer, tmp_path / "ours"):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class Zero(Words):
    """Its optimizer deals the states to the ranks."""

    def configure_optimizers(self) -> Any:
        if not dist.is_initialized():
            return torch.optim.AdamW(self.parameters(), lr=1e-2)
        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.AdamW, lr=1e-2)


def train_zero(layout: str | None, folder: Path, epochs: int, ckpt: Path | None, saved_as: str) -> Any:
    L.seed_everything(1, verbose=False)
    trainer, loader, watch = make(layout, max_epochs=epochs)
    if layout is not None:
        trainer.strategy.checkpoint_options.format = saved_as  # type: ignore[attr-defined]
    trainer.fit(Zero(), loader, ckpt_path=ckpt)
    trainer.save_checkpoint(folder / "a.ckpt")
    return watch.losses, whole_weights(trainer.lightning_module)


@pytest.mark.parametrize("saved_as", ["single", "sharded"])
def test_an_optimizer_that_deals_its_states_is_saved_and_goes_on(saved_as: str, tmp_path: Path) -> None:
    run_on_ranks(2, train_zero, "dp_replicate=2", tmp_path, 1, None, saved_as)
    expected = train_zero(None, tmp_path / "plain", 2, None, saved_as)
    for layout, ranks in (("dp_replicate=2", 2), ("dp_shard=1", 1)):
        args = layout, tmp_path / layout, 2, tmp_path / "a.ckpt", saved_as
        losses, weights = run_on_ranks(2, train_zero, *args)[0] if ranks == 2 else train_zero(*args)
        torch.testing.assert_close(losses, expected[0][6:], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weights, expected[1], rtol=1e-5, atol=1e-6)


def other_optimizers(layout: str, folder: Path) -> None:
    trainer, loader, _ = make(layout)
    trainer.fit(Words(), loader)
    trainer.save_checkpoint(folder / "a.ckpt")

    class Two(Words):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.embed.parameters(), 0.1), torch.optim.SGD(self.head.parameters(), 0.1)]

    trainer, loader, _ = make(layout, max_epochs=2)
    trainer.fit(Two(), loader, ckpt_path=folder / "a.ckpt")


@pytest.mark.parametrize("layout", EACH[:3])
def test_another_number_of_optimizers_is_refused_in_words(layout: str, tmp_path: Path) -> None:
    with pytest.raises((RankError, ValueError), match="the states of 1 optimizers, and configure_optimizers returns 2"):
        everywhere(layout, other_optimizers, tmp_path)


# ------------------------------------------------------------------ building


def built_inside(layout: str | None, ckpt: Path) -> Any:
    L.seed_everything(1, verbose=False)
    trainer, loader, watch = make(layout)
    with trainer.init_module():
        module = Words()
    assert not module.head.weight.is_meta
    trainer.fit(module, loader)
    trainer.save_checkpoint(ckpt)
    trainer, loader, later = make(layout, max_epochs=2)
    with trainer.init_module(empty_init=True):
        before = torch.get_rng_state()
        module = Words()
        assert torch.equal(torch.get_rng_state(), before), "it was initialised"
    trainer.fit(module, loader, ckpt_path=ckpt)
    return watch.losses, later.losses, whole_weights(module)


@pytest.mark.parametrize("layout", EACH)
def test_a_module_is_built_by_the_trainers_context(layout: str, tmp_path: Path) -> None:
    expected = built_inside(None, tmp_path / "plain.ckpt")
    for found in everywhere(layout, built_inside, tmp_path / "ours.ckpt"):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_context_needs_no_run() -> None:
    trainer = L.Trainer(**QUIET, devices=2, strategy="hybrid")
    with trainer.init_module():
        module = Words()
    assert isinstance(module.head.weight, torch.nn.Parameter)
    assert not module.head.weight.is_meta


def test_one_process_is_not_distributed() -> None:
    trainer, loader, _ = make("dp_shard=1")
    trainer.fit(Distributed(), loader)
    assert not trainer._accelerator_connector.is_distributed


class Distributed(Words):
    def on_train_start(self) -> None:
        assert not self.trainer._accelerator_connector.is_distributed


def train_compiled(layout: str | None, whole: bool) -> Any:
    L.seed_everything(1, verbose=False)
    trainer, loader, watch = make(layout, max_steps=3)
    module = Validated()
    compiled = torch.compile(module, backend="eager")
    trainer.fit(compiled if whole else module, loader, loader)
    steps = [name for name in ("forward", "training_step", "validation_step") if name in vars(module)]
    trainer.validate(compiled if whole else module, loader, verbose=False)
    return watch.losses, whole_weights(module), float(trainer.callback_metrics["loss"]), steps


@pytest.mark.parametrize("layout", ["dp_shard=1", "dp_replicate=2"])
def test_a_module_that_is_compiled_whole_trains(layout: str) -> None:
    expected = once(train_compiled, None, True)
    for found in everywhere(layout, train_compiled, True):
        torch.testing.assert_close(found[:3], expected[:3], rtol=1e-5, atol=1e-6)
        assert found[3] == expected[3]


@pytest.mark.parametrize("layout", EACH[2:])
def test_a_module_that_is_compiled_whole_is_refused_where_it_is_divided(layout: str) -> None:
    with pytest.raises(RankError, match=r"pass the module itself, and HybridStrategy\(compile=True\)"):
        everywhere(layout, train_compiled, True)


def test_a_module_that_is_compiled_whole_stays_so_after_a_refusal(tmp_path: Path) -> None:
    trainer, loader, _ = make("dp_shard=1")
    module = Words()
    with pytest.raises(FileNotFoundError):
        trainer.fit(torch.compile(module, backend="eager"), loader, ckpt_path=tmp_path / "gone.ckpt")
    assert module._compiler_ctx is not None
    assert "training_step" in vars(module)


# ------------------------------------------------------------------ loaders


class Asks(Words):
    """For the number of steps, at some moment before a loader is there."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.steps, self.seen = where, 0.0, []

    def ask(self, where: str) -> None:
        if where == self.where:
            self.steps = self.trainer.estimated_stepping_batches

    def setup(self, stage: str) -> None:
        self.ask("setup")

    def configure_optimizers(self) -> Any:
        self.ask("configure_optimizers")
        return super().configure_optimizers()

    def training_step(self, batch: Any) -> Any:
        self.seen.extend(batch[0].tolist())
        return super().training_step(batch)


def asks(layout: str | None, where: str, ckpt: Path | None, saves: Path | None) -> Any:
    L.seed_everything(1, verbose=False)
    trainer, loader, watch = make(layout, max_epochs=2, max_steps=-1 if saves is None else 4)
    module = Asks(where)
    trainer.fit(module, loader, ckpt_path=ckpt)
    if saves is not None:
        trainer.save_checkpoint(saves)
    return watch.losses, module.steps, type(trainer.train_dataloader.sampler).__name__


@pytest.mark.parametrize("where", ["setup", "configure_optimizers"])
@pytest.mark.parametrize("layout", EACH[:3])
def test_who_asks_for_the_number_of_steps_changes_nothing(layout: str, where: str, tmp_path: Path) -> None:
    losses, steps, _ = once(asks, None, where, None, None)
    for found in everywhere(layout, asks, where, None, None):
        torch.testing.assert_close(found[0], losses, rtol=1e-5, atol=1e-6)
        assert found[1] == steps
        assert found[2] != "DistributedSampler"
    everywhere(layout, asks, where, None, tmp_path / "a.ckpt")
    for found in everywhere(layout, asks, where, tmp_path / "a.ckpt", None):
        torch.testing.assert_close(found[0], losses[4:], rtol=1e-5, atol=1e-6)


class Predicts(Words):
    def predict_step(self, batch: Any) -> Any:
        return self(batch[0])

    def on_predict_start(self) -> None:
        batches: Any = self.trainer.predict_dataloaders.batch_sampler
        self.found = type(batches.sampler).__name__, batches.batch_size * self.trainer.strategy.num_data_ranks


class PlainPredicts(Predicts):
    def on_predict_start(self) -> None:
        batches: Any = self.trainer.predict_dataloaders.batch_sampler
        self.found = type(batches.sampler).__name__, batches.batch_size


def predict(layout: str | None) -> Any:
    trainer, loader, _ = make(layout)
    module = PlainPredicts() if layout is None else Predicts()
    trainer.predict(module, loader)
    return module.found


@pytest.mark.parametrize("layout", EACH)
def test_predict_loaders_show_the_users_sampler(layout: str) -> None:
    expected = once(predict, None)
    assert set(everywhere(layout, predict)) == {expected}


def without_gradients(layout: str | None, folder: Path) -> Any:
    L.seed_everything(1, verbose=False)
    trainer, loader, _ = make(layout)
    module = Tested()
    trainer.fit(module, loader)
    trainer.save_checkpoint(folder / "a.ckpt")
    torch.manual_seed(2)
    module = Tested()
    results = []
    with torch.inference_mode():
        trainer, loader, _ = make(layout)
        results += trainer.test(module, loader, verbose=False)
        results += trainer.test(module, loader, ckpt_path=folder / "a.ckpt", verbose=False)
        results += trainer.test(module, loader, ckpt_path=folder / "a.ckpt", verbose=False)
    return results


class Tested(Words):
    def test_step(self, batch: Any) -> None:
        self.log("loss", self.training_step(batch))


@pytest.mark.parametrize("layout", EACH)
def test_tests_within_inference_mode(layout: str, tmp_path: Path) -> None:
    expected = without_gradients(None, tmp_path / "plain")
    for found in everywhere(layout, without_gradients, tmp_path / "ours"):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ after a fit


def copies(layout: str | None) -> Any:
    L.seed_everything(1, verbose=False)
    trainer, loader, watch = make(layout)
    module = Validated()
    trainer.fit(module, loader, loader)
    pickle.dumps(trainer.strategy)
    pickle.dumps(trainer.callbacks)
    again = pickle.loads(pickle.dumps(trainer))
    copied = copy.deepcopy(trainer)
    assert again.global_step == copied.global_step == 6
    assert trainer.strategy.broadcast("still there") == "still there"
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader, loader)
    return watch.losses, whole_weights(module)


@pytest.mark.parametrize("layout", ["dp_shard=1", "dp_replicate=2"])
def test_a_trainer_is_copied_and_pickled_after_a_fit(layout: str) -> None:
    expected = once(copies, None)
    for found in everywhere(layout, copies):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class WithoutSteps(Validated):
    def __init__(self) -> None:
        super().__init__()
        self.validation_step = None  # type: ignore[assignment, method-assign]
        self.test_step = None  # type: ignore[assignment]


def twice(layout: str | None) -> Any:
    L.seed_everything(1, verbose=False)
    module = WithoutSteps()
    losses = []
    for _ in range(2):
        trainer, loader, watch = make(layout)
        trainer.fit(module, loader)
        losses += watch.losses
        assert module.validation_step is module.test_step is None
    return losses, whole_weights(module)


@pytest.mark.parametrize("layout", EACH)
def test_a_module_whose_steps_are_none_trains_twice(layout: str) -> None:
    expected = once(twice, None)
    for found in everywhere(layout, twice):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def on_nothing(layout: str | None) -> tuple[int, int]:
    trainer, _, _ = make(layout)
    trainer.fit(Words(), DataLoader(Subset(words(), []), batch_size=4))
    return trainer.global_step, trainer.current_epoch


@pytest.mark.parametrize("layout", EACH[:3])
def test_no_data_is_no_training(layout: str) -> None:
    assert set(everywhere(layout, on_nothing)) == {on_nothing(None)}


class Normed(Words):
    def build(self) -> None:
        super().build()
        self.norm = torch.nn.BatchNorm1d(16)

    def forward(self, x: Any) -> Any:
        return self.head(self.norm(self.backbone(self.embed(x))))


def averaged(layout: str | None, folder: Path, epochs: int, ckpt: Path | None) -> Any:
    L.seed_everything(1, verbose=False)
    average = EMAWeightAveraging(decay=0.8)
    trainer, loader, watch = make(layout, max_epochs=epochs)
    trainer.callbacks += [average]  # type: ignore[attr-defined]
    trainer.strategy.checkpoint_options.format = "single"  # type: ignore[attr-defined]
    trainer.callbacks += [SavesAtStep(folder / "a.ckpt")]  # type: ignore[attr-defined]
    trainer.fit(Normed(), loader, ckpt_path=ckpt)
    return watch.losses, whole_weights(trainer.lightning_module)


class SavesAtStep(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 9:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("layout", ["dp_replicate=2", "dp_shard=2"])
def test_the_buffers_of_an_average_go_on(layout: str, tmp_path: Path) -> None:
    whole = run_on_ranks(2, averaged, layout, tmp_path, 3, None)
    again = run_on_ranks(2, averaged, layout, tmp_path / "on", 3, tmp_path / "a.ckpt")
    for before, after in zip(whole, again, strict=True):
        torch.testing.assert_close(after[0], before[0][9:], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(after[1], before[1], rtol=1e-5, atol=1e-6)


class Epochs(SequentialSampler):
    """Notes what it is told, and when it is asked."""

    def __init__(self, data: Any) -> None:
        super().__init__(data)
        self.calls: list[Any] = []

    def set_epoch(self, epoch: int) -> None:
        self.calls.append(epoch)

    def __iter__(self) -> Any:
        self.calls.append("iter")
        return super().__iter__()


def told(layout: str | None) -> Any:
    trainer, _, _ = make(layout, max_epochs=2, limit_val_batches=2)
    ranks = 1 if layout is None else trainer.strategy.num_data_ranks  # type: ignore[attr-defined]
    samplers = [Epochs(words()), Epochs(words())]
    train, validation = (DataLoader(words(), batch_size=8 // ranks, sampler=sampler) for sampler in samplers)
    trainer.fit(Validated(), train, validation)
    return [sampler.calls for sampler in samplers], len(trainer.val_dataloaders)


@pytest.mark.parametrize("layout", EACH[:3])
def test_samplers_are_told_the_epoch_once_and_loaders_keep_their_length(layout: str) -> None:
    expected = once(told, None)
    for found in everywhere(layout, told):
        assert found == expected


class Shown(Validated):
    """Notes the loaders that the Trainer shows, in several epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Any] = []

    def on_train_epoch_end(self) -> None:
        self.shown.append((self.trainer.train_dataloader, self.trainer.val_dataloaders))


@pytest.mark.parametrize("shuffle", [False, True])
def test_one_process_shows_the_users_loaders(shuffle: bool) -> None:
    trainer, _, _ = make("dp_shard=1", max_epochs=2)
    train = {"a": DataLoader(words(), 8, shuffle=shuffle), "b": [DataLoader(words(), 4)]}
    validation = [DataLoader(words(), 8), DataLoader(words(), 4)]

    class Several(Shown):
        def training_step(self, batch: Any) -> Any:
            return super().training_step(batch["a"])

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.training_step({"a": batch})

    module = Several()
    trainer.fit(module, train, validation)
    for shown_train, shown_validation in module.shown:
        assert shown_train["a"] is train["a"]
        assert shown_train["b"][0] is train["b"][0]
        assert all(map(lambda a, b: a is b, shown_validation, validation))


def dealt_by_the_user(layout: str) -> bool:
    trainer, loader, _ = make(layout, use_distributed_sampler=False)
    module = Shown()
    trainer.fit(module, loader, loader)
    return all(train is validation is loader for train, validation in module.shown)


def test_loaders_that_the_user_deals_are_shown_as_they_are() -> None:
    assert all(run_on_ranks(2, dealt_by_the_user, "dp_replicate=2"))


class Pickled(Words):
    """Pickles itself in a hook, on all ranks."""

    def on_train_batch_end(self, *args: Any) -> None:
        file = io.BytesIO()
        torch.save(self, file)
        file.seek(0)
        self.again = torch.load(file, weights_only=False)


def pickles_itself(layout: str | None) -> Any:
    L.seed_everything(1, verbose=False)
    trainer, loader, _ = make(layout, max_steps=3)
    module = Pickled()
    trainer.fit(module, loader)
    again = module.again
    assert type(again) is Pickled
    assert all(type(p) is torch.nn.Parameter and p.requires_grad for p in again.parameters())
    return again.state_dict(), again(torch.tensor([1, 2])), type(module).__name__, type(module.backbone[1]).__name__


@pytest.mark.parametrize("layout", ["dp_shard=1", "dp_replicate=2", "dp_shard=2"])
def test_a_module_pickles_as_a_whole_and_keeps_its_name(layout: str) -> None:
    expected = once(pickles_itself, None)
    for found in everywhere(layout, pickles_itself):
        torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-6)
        assert found[2:] == expected[2:]
