"""What a checkpoint restores, and when: before optimizers are made and a fit starts, as in one process."""

from __future__ import annotations

import itertools
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, EMAWeightAveraging, ModelCheckpoint, Timer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from tests.support.models import Words, words
from tests.support.parity import QUIET, Watch, slow, whole_weights
from tests.support.ranks import RankError, run_on_ranks

pytestmark = pytest.mark.sampled

LAYOUTS = {"dp_shard=1": 1, "dp_replicate=2": 2, "dp_shard=2": 2, "tp=2": 2, "pp=2": 2, "dp_shard=2,tp=2": 4}
QUICK = [("dp_replicate=2", "auto", False), ("dp_shard=2", "sharded", False), ("dp_shard=2", "sharded", True)]
CASES = [
    case if case in QUICK else slow(*case) for case in itertools.product(LAYOUTS, ("auto", "sharded"), (False, True))
]
"""Layouts, forms of the checkpoint, and whether the module is built in ``configure_model``."""
SHORT = [(layout, form) for layout, form, deferred in QUICK if not deferred]
PAIRS = [case if case in SHORT else slow(*case) for case in itertools.product(LAYOUTS, ("auto", "sharded"))]


class Custom:
    """Of the user's: no restricted unpickler makes it."""

    def __init__(self, value: int) -> None:
        self.value = value


class Resized(Words):
    """A vocabulary that grows between two runs; the new rows are drawn, the old ones loaded."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        saved = state["embed.weight"]
        assert saved.shape == (10, 16)
        rows = torch.linspace(-1, 1, 2 * 16).view(2, 16)
        state["embed.weight"] = torch.cat([saved, rows])
        state["head.weight"] = torch.cat([state["head.weight"], rows])
        state["head.bias"] = torch.cat([state["head.bias"], torch.zeros(2)])
        self.embed, self.head = nn.Embedding(12, 16), nn.Linear(16, 12)
        checkpoint["optimizer_states"] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-1)


def fit(
    layout: str | None,
    folder: Path,
    module: L.LightningModule,
    *,
    epochs: int = 1,
    ckpt: Path | None = None,
    saved_as: str = "auto",
    callbacks: Any = (),
    **arguments: Any,
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final weights; leaves ``last.ckpt`` in the folder."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    strategy: Any = "auto"
    ranks = 1
    if layout is not None:
        strategy = HybridStrategy(layout, checkpoint_format=saved_as)  # type: ignore[arg-type]
        ranks = strategy.ranks.requested.resolve(world).num_data_ranks
    watch = Watch()
    trainer = L.Trainer(
        **{**QUIET, "enable_checkpointing": True},
        devices=world,
        strategy=strategy,
        max_epochs=epochs,
        callbacks=[watch, ModelCheckpoint(folder, save_last=True, save_top_k=0), *callbacks],
        num_sanity_val_steps=0,
    )
    trainer.fit(module, DataLoader(words(), batch_size=8 // ranks), ckpt_path=ckpt, **arguments)
    return watch.losses, whole_weights(module)


def on(layout: str | None, function: Any, *args: Any) -> Any:
    """Of rank 0, where all ranks have the same."""
    if layout is None or LAYOUTS[layout] == 1:
        return function(layout, *args)
    return run_on_ranks(LAYOUTS[layout], function, layout, *args)[0]


# ------------------------------------------------------------------ custom objects


def save_custom(layout: str | None, folder: Path, saved_as: str, deferred: bool) -> Any:
    L.seed_everything(1, verbose=False)
    return fit(layout, folder, Words(deferred, Custom(3)), saved_as=saved_as)


def load_custom(layout: str | None, folder: Path, saved_as: str, deferred: bool, weights_only: bool | None) -> Any:
    L.seed_everything(2, verbose=False)
    module = Words(deferred)
    ckpt = folder / "last.ckpt"
    return fit(layout, folder / "on", module, epochs=2, ckpt=ckpt, saved_as=saved_as, weights_only=weights_only)


@pytest.mark.parametrize(("layout", "saved_as", "deferred"), CASES)
def test_a_custom_object_loads_where_the_user_trusts_the_file(
    layout: str, saved_as: str, deferred: bool, tmp_path: Path
) -> None:
    on(layout, save_custom, tmp_path / "ours", saved_as, deferred)
    losses, weights = on(layout, load_custom, tmp_path / "ours", saved_as, deferred, False)
    save_custom(None, tmp_path / "plain", "auto", deferred)
    expected = load_custom(None, tmp_path / "plain", "auto", deferred, False)
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights, expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["dp_shard=1", "dp_shard=2"])
def test_a_custom_object_is_refused_with_what_to_pass(layout: str, tmp_path: Path) -> None:
    on(layout, save_custom, tmp_path, "auto", False)
    with pytest.raises((RankError, ValueError), match="pass weights_only=False"):
        on(layout, load_custom, tmp_path, "auto", False, None)


# ------------------------------------------------------------------ modules that a hook changes


class Keeps(Words):
    """What does not fit the checkpoint stays as it was initialised."""

    def __init__(self, deferred: bool) -> None:
        super().__init__(deferred, words=12)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own, state = self.state_dict(), checkpoint["state_dict"]
        for name in list(state):
            if state[name].shape != own[name].shape:
                state[name] = own[name]
        checkpoint["optimizer_states"] = []


def save_words(layout: str | None, folder: Path, saved_as: str, deferred: bool) -> Any:
    L.seed_everything(1, verbose=False)
    return fit(layout, folder, Words(deferred), saved_as=saved_as)


def resize(layout: str | None, folder: Path, saved_as: str, deferred: bool, kind: type[Words] = Resized) -> Any:
    L.seed_everything(2, verbose=False)
    module = kind(deferred)
    world = dist.get_world_size() if dist.is_initialized() else 1
    strategy: Any = "auto" if layout is None else HybridStrategy(layout, checkpoint_format=saved_as)  # type: ignore[arg-type]
    trainer = L.Trainer(**QUIET, devices=world, strategy=strategy, max_epochs=1, callbacks=[watch := Watch()])
    ranks = 1 if layout is None else strategy.ranks.requested.resolve(world).num_data_ranks
    trainer.fit_loop.load_state_dict = lambda state: None  # type: ignore[method-assign]  # another run, from its start
    loader = DataLoader(words(), batch_size=8 // ranks)
    trainer.fit(module, loader, ckpt_path=folder / "last.ckpt")
    before = torch.linspace(-1, 1, 2 * 16).view(2, 16)
    return watch.losses, whole_weights(module), before


@pytest.mark.parametrize(("layout", "saved_as", "deferred"), CASES)
def test_a_module_that_a_hook_replaced_is_trained(layout: str, saved_as: str, deferred: bool, tmp_path: Path) -> None:
    save_words(None, tmp_path / "plain", "auto", deferred)
    expected = resize(None, tmp_path / "plain", "auto", deferred)
    assert not torch.equal(expected[1]["head.weight"][10:], expected[2])
    on(layout, save_words, tmp_path / "ours", saved_as, deferred)
    losses, weights, _ = on(layout, resize, tmp_path / "ours", saved_as, deferred)
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights, expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("layout", "saved_as", "deferred"), CASES)
def test_what_does_not_fit_may_stay_as_it_was_initialised(
    layout: str, saved_as: str, deferred: bool, tmp_path: Path
) -> None:
    save_words(None, tmp_path / "plain", "auto", deferred)
    expected = resize(None, tmp_path / "plain", "auto", deferred, Keeps)
    on(layout, save_words, tmp_path / "ours", saved_as, deferred)
    losses, weights, _ = on(layout, resize, tmp_path / "ours", saved_as, deferred, Keeps)
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights, expected[1], rtol=1e-5, atol=1e-6)


class Parts(Words):
    """Loads a part of itself in the hook, from an entry of its own."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        shape = (self.words, 16)
        checkpoint["head"] = {
            "weight": torch.linspace(-1, 1, 16 * self.words).view(shape),
            "bias": torch.zeros(shape[0]),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in ("head.weight", "head.bias"):
            del checkpoint["state_dict"][name]
        self.strict_loading = False
        self.head.load_state_dict(checkpoint.pop("head"))


def parts(layout: str | None, folder: Path, saved_as: str, deferred: bool) -> Any:
    L.seed_everything(1, verbose=False)
    fit(layout, folder, Parts(deferred), saved_as=saved_as)
    ckpt = folder / "last.ckpt"
    return fit(layout, folder / "on", Parts(deferred), epochs=2, ckpt=ckpt, saved_as=saved_as)


@pytest.mark.parametrize(("layout", "saved_as", "deferred"), CASES)
def test_a_part_that_a_hook_loads_is_loaded(layout: str, saved_as: str, deferred: bool, tmp_path: Path) -> None:
    expected = parts(None, tmp_path / "plain", "auto", deferred)
    losses, weights = on(layout, parts, tmp_path / "ours", saved_as, deferred)
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights, expected[1], rtol=1e-5, atol=1e-6)


class Writes(Words):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        with torch.no_grad():
            self.head.weight[:2].copy_(checkpoint["state_dict"]["head.weight"][:2])


def writes(layout: str, folder: Path) -> None:
    fit(layout, folder, Words(True))
    fit(layout, folder / "on", Writes(True), epochs=2, ckpt=folder / "last.ckpt")


def test_a_write_to_what_is_deferred_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"head\.weight is deferred while a checkpoint is restored"):
        on("dp_shard=2", writes, tmp_path)


class Makes(Words):
    """Makes layers of what it finds in the checkpoint, and keeps some of it."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        self.embed = nn.Embedding.from_pretrained(state["embed.weight"], freeze=False)
        self.head.bias = nn.Parameter(state["head.bias"] + 0.5)
        state["head.bias"] = state["head.bias"] + 0.5
        self.anchor = {name: value for name, value in state.items() if "backbone" in name}
        if self.trainer.is_global_zero:
            self.size = float(sum(value.norm() for value in state.values()))

    def on_train_end(self) -> None:
        self.anchors = {name: value.clone() for name, value in self.anchor.items()}


def makes(layout: str | None, folder: Path, saved_as: str) -> Any:
    L.seed_everything(1, verbose=False)
    fit(layout, folder, Words(), saved_as=saved_as)
    module = Makes()
    losses, weights = fit(layout, folder, module, epochs=2, ckpt=folder / "last.ckpt", saved_as=saved_as)
    return losses, weights, module.anchors


@pytest.mark.parametrize(("layout", "saved_as"), PAIRS)
def test_layers_that_a_hook_makes_of_a_checkpoint_are_trained(layout: str, saved_as: str, tmp_path: Path) -> None:
    expected = makes(None, tmp_path / "plain", "auto")
    found = on(layout, makes, tmp_path / "ours", saved_as)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Head(Words):
    """Only its last layer is trained."""

    def configure_optimizers(self) -> Any:
        for part in (self.embed, self.backbone):
            part.requires_grad_(False)
        return torch.optim.Adam(self.head.parameters(), lr=1e-2)


class LooksOnRankZero(Callback):
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any) -> None:
        if trainer.is_global_zero:
            assert all(float(value.double().norm()) >= 0 for value in checkpoint["state_dict"].values())


def head(layout: str | None, folder: Path, saved_as: str, deferred: bool) -> Any:
    L.seed_everything(1, verbose=False)
    fit(layout, folder, Head(deferred), saved_as=saved_as)
    ckpt, looks = folder / "last.ckpt", [LooksOnRankZero()]
    return fit(layout, folder / "on", Head(deferred), epochs=2, ckpt=ckpt, saved_as=saved_as, callbacks=looks)


@pytest.mark.parametrize(
    ("layout", "saved_as", "deferred"), [*CASES[:-4], ("pp=2", "sharded", False), ("dp_shard=2", "sharded", True)]
)
def test_ranks_that_read_different_things_read_together(
    layout: str, saved_as: str, deferred: bool, tmp_path: Path
) -> None:
    expected = head(None, tmp_path / "plain", "auto", deferred)
    losses, weights = on(layout, head, tmp_path / "ours", saved_as, deferred)
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights, expected[1], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ callbacks


def finetune(layout: str | None, folder: Path, epochs: int, ckpt: Path | None, saved_as: str) -> Any:
    """A backbone that thaws in the second epoch."""
    L.seed_everything(1, verbose=False)
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False, backbone_initial_lr=1e-3)
    return fit(layout, folder, Words(), epochs=epochs, ckpt=ckpt, callbacks=[callback], saved_as=saved_as)


@pytest.mark.parametrize(("layout", "saved_as"), PAIRS)
def test_a_backbone_that_was_thawed_goes_on(layout: str, saved_as: str, tmp_path: Path) -> None:
    finetune(None, tmp_path / "plain", 2, None, "auto")
    expected = finetune(None, tmp_path / "plain_on", 3, tmp_path / "plain" / "last.ckpt", "auto")
    on(layout, finetune, tmp_path / "ours", 2, None, saved_as)
    losses, weights = on(layout, finetune, tmp_path / "on", 3, tmp_path / "ours" / "last.ckpt", saved_as)
    torch.testing.assert_close(losses, expected[0][-len(losses) :], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights, expected[1], rtol=1e-5, atol=1e-6)


class Events(Callback):
    """Notes the order of what Lightning calls."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def setup(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("setup")

    def on_fit_start(self, *args: Any) -> None:
        self.seen.append("on_fit_start")

    def on_load_checkpoint(self, *args: Any) -> None:
        self.seen.append("on_load_checkpoint")

    def load_state_dict(self, state_dict: Any) -> None:
        self.seen.append(f"load_state_dict {state_dict}")

    def state_dict(self) -> dict[str, Any]:
        return {"kept": 7}

    def on_train_start(self, *args: Any) -> None:
        self.seen.append("on_train_start")


def order(layout: str | None, folder: Path) -> tuple[list[str], float]:
    L.seed_everything(1, verbose=False)
    timer = Timer(timedelta(seconds=100))
    fit(layout, folder, Words(), callbacks=[Events(), timer])
    events, timer = Events(), Timer(timedelta(seconds=100))
    offsets: list[float] = []
    timer.on_fit_start = partial(_note, timer, timer.on_fit_start, offsets)  # type: ignore[method-assign]
    fit(layout, folder / "on", Words(), epochs=2, ckpt=folder / "last.ckpt", callbacks=[events, timer])
    return events.seen, offsets[0]


def _note(timer: Timer, original: Any, offsets: list[float], *args: Any, **kwargs: Any) -> None:
    offsets.append(timer._offset)
    original(*args, **kwargs)


@pytest.mark.parametrize("layout", ["dp_shard=1", slow("dp_replicate=2"), "dp_shard=2", slow("pp=2")])
def test_callbacks_have_their_state_when_the_fit_starts(layout: str, tmp_path: Path) -> None:
    expected, _ = order(None, tmp_path / "plain")
    seen, offset = on(layout, order, tmp_path / "ours")
    assert seen == expected
    assert offset > 0, "the timer began anew"


def average(layout: str | None, folder: Path, saved_as: str, epochs: int, ckpt: Path | None) -> Any:
    L.seed_everything(1 if ckpt is None else 2, verbose=False)
    callback = EMAWeightAveraging(decay=0.8)
    return fit(layout, folder, Words(), epochs=epochs, ckpt=ckpt, callbacks=[callback], saved_as=saved_as)


@pytest.mark.parametrize(("layout", "saved_as"), [case for case in PAIRS if "pp=2" not in str(case)])
def test_a_callback_that_loads_other_weights_has_the_last_word(layout: str, saved_as: str, tmp_path: Path) -> None:
    average(None, tmp_path / "plain", "auto", 2, None)
    expected = average(None, tmp_path / "plain_on", "auto", 3, tmp_path / "plain" / "last.ckpt")
    on(layout, average, tmp_path / "ours", saved_as, 2, None)
    losses, weights = on(layout, average, tmp_path / "on", saved_as, 3, tmp_path / "ours" / "last.ckpt")
    torch.testing.assert_close(losses, expected[0][-len(losses) :], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights, expected[1], rtol=1e-5, atol=1e-6)


class Puts(Callback):
    """Loads weights of its own after those of the checkpoint."""

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any) -> None:
        generator = torch.Generator().manual_seed(6)
        shapes = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        state = {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}
        assert not pl_module.load_state_dict(state).missing_keys


def put(layout: str | None, folder: Path, deferred: bool, saved_as: str) -> Any:
    L.seed_everything(1, verbose=False)
    fit(layout, folder, Words(deferred), saved_as=saved_as)
    module = Words(deferred)
    return fit(
        layout, folder / "on", module, epochs=2, ckpt=folder / "last.ckpt", callbacks=[Puts()], saved_as=saved_as
    )


@pytest.mark.parametrize(("layout", "saved_as"), PAIRS)
def test_what_is_loaded_into_a_deferred_module_is_there_in_order(layout: str, saved_as: str, tmp_path: Path) -> None:
    expected = put(None, tmp_path / "plain", True, "auto")
    losses, weights = on(layout, put, tmp_path / "ours", True, saved_as)
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights, expected[1], rtol=1e-5, atol=1e-6)
