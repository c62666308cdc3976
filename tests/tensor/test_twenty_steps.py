"""Twenty steps of every family on the tensor axis and the data axes: the numbers of one process.

One family of each way to be divided runs here, under one layout; all of them, under all layouts, with
``pytest -m slow tests/tensor``. (``test_families`` compares one step of every family.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor
from torch.utils.data import Dataset

from lightning_dist.plans.tensor import find_tensor_plan
from tests.support.parity import Record, Run, on_layout, one_process, slow
from tests.tensor.families import FAMILIES, WITHOUT_CHAIN

STEPS, ACCUMULATE, BATCH = 20, 2, 4
TOLERANCE = 1e-5
LAYOUTS = {"tp=2": 2, "tp=4": 4, "dp_shard=2,tp=2": 4, "dp_replicate=2,tp=2": 4}
DIFFERENT = ("llama", slow("timm vit norms"))
"""Families that differ in how they are divided; the others run on demand, as these do under the other layouts."""

BATCH_LAST = ("torch attention",)
"""Families whose inputs have their samples along the second dim."""


@dataclass
class Samples(Dataset):
    """Of a family; each drawn from a seed of its own."""

    name: str

    def __len__(self) -> int:
        return STEPS * ACCUMULATE * BATCH

    def __getitem__(self, index: int) -> Any:
        torch.manual_seed(index)
        inputs = FAMILIES[self.name].inputs()
        dim, row = int(self.name in BATCH_LAST), index % 2
        if isinstance(inputs, dict):
            return {
                name: value.select(dim, row) if isinstance(value, Tensor) else value for name, value in inputs.items()
            }
        return tuple(value.select(dim, row) for value in inputs)


class Training(L.LightningModule):
    """A network of a family, and a loss that is a mean over samples."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.network = name, FAMILIES[name].network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, dict):
            if "use_cache" in batch:
                batch = {**batch, "use_cache": False}
            output = self.network(**batch)
        elif self.name in BATCH_LAST:
            return torch.stack(
                [self._spread(self.network(*(x[i, :, None] for x in batch))) for i in range(len(batch[0]))]
            ).mean()
        else:
            output = self.network(*batch)
        if isinstance(output, hf.utils.ModelOutput):
            if "loss" in output:
                return output.loss
            output = next(iter(output.values()))
        return self._spread(output)

    @staticmethod
    def _spread(output: Tensor) -> Tensor:
        """A number that depends on all of the output, with the same target for each sample."""
        size = output[0].numel()
        return F.mse_loss(
            output, torch.sin(torch.arange(size, dtype=output.dtype)).view(1, *output.shape[1:]).expand_as(output)
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9, weight_decay=0.01)


def run_of(name: str, sequence_parallel: bool) -> Run:
    return Run(
        partial(Training, name),
        partial(Samples, name),
        batch_size=BATCH,
        trainer={"gradient_clip_val": 0.5, "accumulate_grad_batches": ACCUMULATE},
        strategy={"sequence_parallel": sequence_parallel},
    )


def _assert_equal(one: Record, other: Record) -> None:
    torch.testing.assert_close(other.losses, one.losses, rtol=TOLERANCE, atol=TOLERANCE / 10)
    torch.testing.assert_close(other.norms, one.norms, rtol=TOLERANCE, atol=TOLERANCE / 10)
    # what attention does not see (a bias of all keys) moves by rounding alone: it counts as a part of its network
    least = 1e-3 * max(float(weight.float().norm()) for weight in one.weights.values())
    for name, weight in one.weights.items():
        if not weight.is_floating_point():
            assert torch.equal(other.weights[name], weight)
            continue
        difference = (other.weights[name] - weight).norm() / weight.norm().clamp(min=least)
        assert difference <= TOLERANCE, f"{name}: {difference:.1e}"


def _compare(name: str, layout: str, sequence_parallel: bool) -> None:
    one = one_process(run_of(name, False))
    assert len(one.norms) == STEPS
    for record in on_layout(run_of(name, sequence_parallel), layout, LAYOUTS[layout]):
        _assert_equal(one, record)


@pytest.mark.parametrize("name", DIFFERENT)
def test_twenty_steps_equal_one_process(name: str) -> None:
    _compare(name, "dp_shard=2,tp=2", name not in WITHOUT_CHAIN)


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_twenty_steps_equal_one_process_under_every_layout(name: str, layout: str, sequence_parallel: bool) -> None:
    if sequence_parallel and name in WITHOUT_CHAIN:
        pytest.skip("refused, see test_families")
    tp = int(layout[-1])
    if any(
        number % tp for part in find_tensor_plan(FAMILIES[name].network()).values() for number in part.divides.values()
    ):
        pytest.skip("tp does not divide the heads")
    _compare(name, layout, sequence_parallel)
