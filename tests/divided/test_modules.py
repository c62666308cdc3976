"""What divided parameters leave on a module, and what they leave alone."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import lightning as L
import pytest
from torch import nn
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from tests.support import models
from tests.support.models import few_samples, samples
from tests.support.parity import QUIET
from tests.support.ranks import run_on_ranks


def _trainer(layout: str, **options: Any) -> L.Trainer:
    return L.Trainer(**{**QUIET, "max_steps": 2, "devices": 2, **options}, strategy=HybridStrategy(layout))


def _is_freed(layout: str) -> bool:
    module = models.Classifier()
    _trainer(layout).fit(module, DataLoader(samples(), batch_size=4))
    alive = weakref.ref(module)
    del module
    gc.collect()
    return alive() is None


@pytest.mark.parametrize("layout", ["dp_replicate=2", "dp_shard=2"])
def test_a_module_is_freed_after_its_fit(layout: str) -> None:
    assert run_on_ranks(2, _is_freed, layout) == [True, True]


def _modes() -> tuple[list[bool], list[bool]]:
    during: list[bool] = []

    class Mode(L.Callback):
        def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            during.append(trainer.validate_loop.inference_mode)

    trainer = _trainer("dp_shard=2", callbacks=[Mode()])
    trainer.validate(models.Classifier(), DataLoader(few_samples(), batch_size=4), verbose=False)
    return during, [trainer.validate_loop.inference_mode, trainer.predict_loop.inference_mode]


def test_evaluation_is_not_in_inference_mode_and_the_users_choice_comes_back() -> None:
    assert run_on_ranks(2, _modes) == [([False], [True, True])] * 2


class ClassSeen(models.Classifier):
    """Notes the class of a parameter that is gathered."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.kind = type(self.net.stem.weight)  # type: ignore[union-attr]
        return super().training_step(batch, batch_idx)


def _class_when_compiled() -> bool:
    module = ClassSeen()
    module.net.blocks[0].compile(backend="eager")  # type: ignore[index, union-attr]
    _trainer("dp_shard=2").fit(module, DataLoader(samples(), batch_size=4))
    return module.kind is nn.Parameter


def test_parameters_that_torch_compile_sees_keep_torchs_class() -> None:
    assert run_on_ranks(2, _class_when_compiled) == [True, True]
