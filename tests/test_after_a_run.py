"""After a run the module is the user's again: whole, with its own code, and nothing of ours on it or on the Trainer."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from tests.support.models import Tied, Words, samples, words
from tests.support.parity import QUIET, slow
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

LAYOUTS = {"dp_replicate=2": 2, "dp_shard=2": 2, "tp=2": 2, "pp=2": 2, "dp_shard=2,tp=2": 4, "pp=2,dp_shard=2": 4}
RUNS = ("fit", "validate", "test", "predict", "raise", "raise before the setup")
GATE = [
    *[(layout, "fit") for layout in LAYOUTS if layout != "pp=2,dp_shard=2"],
    *[("dp_shard=2", "validate"), ("tp=2", "test"), ("pp=2", "predict"), ("pp=2", "raise before the setup")],
    ("dp_shard=2", "raise"),
]
CASES = [*GATE, *[slow(layout, how) for layout in LAYOUTS for how in RUNS if (layout, how) not in GATE]]


class Module(Words):
    """Steps of every kind, of which one may raise."""

    how = ""

    def setup(self, stage: str) -> None:
        if self.how == "raise before the setup":
            raise ArithmeticError(self.how)

    def training_step(self, batch: Any) -> Tensor:
        if self.how == "raise":
            raise ArithmeticError(self.how)
        loss = super().training_step(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any) -> Tensor:
        return super().training_step(batch)

    test_step = validation_step

    def predict_step(self, batch: Any) -> Tensor:
        return self(batch[0])


class Keeper(Callback):
    """Holds a copy of the network, and parameters of it."""

    def __init__(self, module: L.LightningModule) -> None:
        self.parameters = list(module.parameters())

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.copied = copy.deepcopy(pl_module)
        if trainer.is_global_zero:
            self.copied_by_one_rank = copy.deepcopy(pl_module)


def look(module: nn.Module) -> list[Any]:
    """What one sees of a module beside its values: classes, attributes, hooks, objects."""
    hooks = [[len(v) for k, v in vars(m).items() if "hooks" in k and v is not None] for m in module.modules()]
    own = [sorted(vars(m).keys() - {"_hparams"}) for m in module.modules()]
    return [
        [type(m) for m in module.modules()],
        own,
        hooks,
        {n: (id(p), type(p)) for n, p in module.named_parameters()},
    ]


def ours(owner: Any) -> list[str]:
    """Attributes of an object, as its instance has them, in which something of this package is."""
    found = []
    for name, value in vars(owner).items():
        function = getattr(value, "func", value)
        where = [type(value).__module__, getattr(function, "__module__", None)]
        if name != "strategy" and any(str(module).startswith("lightning_dist") for module in where):
            found.append(f"{type(owner).__name__}.{name}")
    return found


def run(trainer: L.Trainer, module: Module, loader: Any, how: str) -> None:
    module.how = how
    if how in ("validate", "test", "predict"):
        getattr(trainer, how)(module, loader)
    elif how == "fit":
        trainer.fit(module, loader)
    else:
        with pytest.raises(ArithmeticError):
            trainer.fit(module, loader)
    del module.how


def in_a_run(layout: str | None, how: str) -> dict[str, Any]:
    L.seed_everything(1, verbose=False)
    module = Module()
    module.example_input_array = torch.arange(4)
    before = look(module)
    keeper = Keeper(module)
    world = dist.get_world_size() if layout else 1
    strategy: Any = "auto" if layout is None else HybridStrategy(layout)
    ranks = 1 if layout is None else strategy.ranks.requested.resolve(world).num_data_ranks
    trainer = L.Trainer(**QUIET, devices=world, strategy=strategy, max_epochs=1, callbacks=[keeper])
    loader = DataLoader(words(), batch_size=8 // ranks)
    dealt = dict(vars(loader))
    run(trainer, module, loader, how)
    loops: list[Any] = [trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.val_loop]
    loops += [trainer.validate_loop, trainer.test_loop, trainer.predict_loop, trainer.precision_plugin]
    assert not [name for one in (trainer, module, keeper, loader, *loops, *module.modules()) for name in ours(one)]
    assert vars(loader).keys() == dealt.keys()
    if "pp" not in str(layout):  # of which a copy has the rank's stages
        assert all(type(p) is nn.Parameter for p in getattr(keeper, "copied", module).parameters())
    assert [id(p) for p in keeper.parameters] == [id(p) for p in module.parameters()]
    assert look(module) == before
    module.trainer = None
    exported = torch.export.export(module, (torch.arange(4),)).module()(torch.arange(4))
    scripted = module.to_torchscript(method="trace", example_inputs=torch.arange(4))
    torch.testing.assert_close(scripted(torch.arange(4)), exported)
    file = io.BytesIO()
    torch.save(module, file)
    return {"pickled": pickle.dumps(module), "copied": pickle.dumps(copy.deepcopy(module)), "saved": file.getvalue()}


def trained_on(module: Module) -> dict[str, Tensor]:
    """In plain Lightning, in this process."""
    L.seed_everything(2, verbose=False)
    L.Trainer(**QUIET, devices=1, max_epochs=1).fit(module, DataLoader(words(), batch_size=8))
    return module.state_dict()


@pytest.mark.parametrize(("layout", "how"), CASES)
def test_the_module_is_as_it_was_and_trains_on_in_plain_lightning(layout: str, how: str) -> None:
    expected = trained_on(pickle.loads(in_a_run(None, how)["pickled"]))
    for found in run_on_ranks(LAYOUTS[layout], in_a_run, layout, how):
        torch.testing.assert_close(trained_on(pickle.loads(found["pickled"])), expected, rtol=1e-5, atol=1e-6)
        whole = pickle.loads(found["pickled"]).state_dict()
        torch.testing.assert_close(pickle.loads(found["copied"]).state_dict(), whole, rtol=0, atol=0)
        saved = torch.load(io.BytesIO(found["saved"]), weights_only=False)
        torch.testing.assert_close(saved.state_dict(), whole, rtol=0, atol=0)


def several_runs(layout: str | None, path: str) -> dict[str, Tensor]:
    """Of one Trainer, with a checkpoint in between that it goes on from."""
    L.seed_everything(1, verbose=False)
    module = Tied()
    strategy: Any = "auto" if layout is None else HybridStrategy(layout)
    world = dist.get_world_size() if layout else 1
    ranks = 1 if layout is None else strategy.ranks.requested.resolve(world).num_data_ranks
    trainer = L.Trainer(**QUIET, devices=world, strategy=strategy, max_epochs=1)
    loader = DataLoader(samples(), batch_size=8 // ranks)
    trainer.validate(module, loader, verbose=False)
    trainer.fit(module, loader)
    trainer.save_checkpoint(path)
    trainer.test(module, loader, verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader, ckpt_path=path)
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("layout", ["dp_shard=2", "pp=2"])
def test_one_trainer_runs_again_and_goes_on_from_what_it_saved_between(layout: str, tmp_path: Any) -> None:
    expected = several_runs(None, str(tmp_path / "one.ckpt"))
    for found in run_on_ranks(2, several_runs, layout, str(tmp_path / "ours.ckpt")):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class MadeInInit(Words):
    """Its optimizer is one of its attributes, and has a state from the second fit on."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)

    def configure_optimizers(self) -> Any:
        return self.optimizer


def two_fits(layout: str | None) -> tuple[dict[str, Tensor], list[Any]]:
    L.seed_everything(1, verbose=False)
    module = MadeInInit()
    world = dist.get_world_size() if layout else 1
    for _ in range(2):
        strategy: Any = "auto" if layout is None else HybridStrategy(layout)
        ranks = 1 if layout is None else strategy.ranks.requested.resolve(world).num_data_ranks
        trainer = L.Trainer(**QUIET, devices=world, strategy=strategy, max_epochs=1)
        trainer.fit(module, DataLoader(words(), batch_size=8 // ranks))
    states = [module.optimizer.state[p] for p in module.parameters()]
    return {name: value.clone() for name, value in module.state_dict().items()}, states


@pytest.mark.parametrize("layout", ["dp_shard=2", "tp=2", "dp_shard=2,tp=2"])
def test_an_optimizer_of_the_module_goes_on_from_its_state_in_a_second_fit(layout: str) -> None:
    expected = two_fits(None)
    for found in run_on_ranks(LAYOUTS[layout], two_fits, layout):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


KEPT: list[torch.optim.Optimizer] = []


class Keeps(Tied):
    """Its optimizer is a global one, of which nobody can be given other parameters."""

    def configure_optimizers(self) -> Any:
        KEPT[:] = KEPT or [torch.optim.AdamW(self.parameters(), lr=1e-2)]
        return KEPT[0]


def with_an_earlier_optimizer() -> str:
    module = Keeps()
    for layout in ("dp_replicate=2", "dp_shard=2"):
        trainer = L.Trainer(**QUIET, devices=2, strategy=HybridStrategy(layout), max_epochs=1)
        try:
            trainer.fit(module, DataLoader(samples(), batch_size=4))
        except ValueError as error:
            return f"{layout}: {error}"
    return "went on"


def test_an_optimizer_of_an_earlier_run_that_would_train_nothing_is_refused() -> None:
    for told in run_on_ranks(2, with_an_earlier_optimizer):
        assert told.startswith("dp_shard=2: AdamW of an earlier run holds net.stem.weight")
