"""The tensor axis under the Trainer: both recipes give the numbers of one process, alone and with the data axes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import pytest
import timm
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from recipes.image_classification import ImageClassifier
from recipes.language_model import CausalLM
from recipes.language_model.decoder import Decoder
from recipes.optimization import warmup_cosine
from tests.recipes.runs import RUNS, VOCABULARY
from tests.support.models import CLASSES, WIDTH, Classifier, samples
from tests.support.parity import Run, assert_parity, on_layout, one_process, slow
from tests.tensor.families import FAMILIES

LAYOUTS = [("tp=2", 2), ("dp_shard=2,tp=2", 4), ("dp_replicate=2,tp=2", 4)]


@pytest.mark.parametrize(("layout", "num_ranks"), [LAYOUTS[0], *(slow(*layout) for layout in LAYOUTS[1:])])
@pytest.mark.parametrize("recipe", [name for name in RUNS if name != "medicine"])  # of convolutions alone
def test_twenty_steps_equal_one_process(recipe: str, layout: str, num_ranks: int) -> None:
    assert_parity(RUNS[recipe], layout, num_ranks)


@pytest.mark.slow
def test_four_ranks_divide_four_heads() -> None:
    assert_parity(RUNS["image_classification"], "tp=4", 4)


@pytest.mark.parametrize(("layout", "num_ranks"), [LAYOUTS[0], *(slow(*layout) for layout in LAYOUTS[1:])])
def test_accumulation_equals_one_process(layout: str, num_ranks: int) -> None:
    run = RUNS["language_model"]
    accumulating: Run = replace(run, trainer={**run.trainer, "accumulate_grad_batches": 3})
    assert_parity(accumulating, layout, num_ranks)


# A shift of all keys moves no attention, so a bias of keys has a gradient of nothing but rounding: AdamW would scale
# that up to whole steps, and a norm's bias, which starts at zero, would be nothing else.
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)


def vit_with_norms() -> L.LightningModule:
    """Attention with norms of its heads, whose gradients each rank has a part of."""
    network = partial(
        timm.create_model,
        "vit_tiny_patch16_224",
        **{"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10},
        **{"embed_dim": 32, "depth": 2, "num_heads": 4, "qk_norm": True, "norm_layer": "rmsnorm"},
    )
    return ImageClassifier(network, SGD, warmup_cosine, num_classes=10)


NORMS = replace(RUNS["image_classification"], module=vit_with_norms)


@pytest.mark.parametrize(
    ("layout", "num_ranks", "accumulate"),
    [("tp=2", 2, 1), ("dp_shard=2,tp=2", 4, 3), slow("dp_replicate=2,tp=2", 4, 3)],
)
def test_partial_gradients_are_summed_once(layout: str, num_ranks: int, accumulate: int) -> None:
    trainer = {**NORMS.trainer, "accumulate_grad_batches": accumulate}
    assert_parity(replace(NORMS, trainer=trainer), layout, num_ranks)


class Watched(Callback):
    """Logs the gradients' norm where users look at it."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        named = [(name, p.grad) for name, p in pl_module.named_parameters() if "q_norm" in name or "head" in name]
        pl_module.log("norm", sum(gradient.norm() for _, gradient in named if gradient is not None))


@pytest.mark.parametrize(("layout", "num_ranks"), [("tp=2", 2), ("dp_replicate=2", 2)])
def test_hooks_after_backward_see_finished_gradients(layout: str, num_ranks: int) -> None:
    assert_parity(replace(NORMS, callbacks=_watched), layout, num_ranks)


def _watched() -> list[Callback]:
    return [Watched()]


def uneven_decoder() -> L.LightningModule:
    """Neither its vocabulary nor its feed-forward width divides by two."""
    network = partial(Decoder, VOCABULARY + 1, width=32, depth=2, num_heads=4, num_kv_heads=2, feed_forward_width=45)
    return CausalLM(network, SGD, warmup_cosine)


@pytest.mark.parametrize(
    ("layout", "num_ranks", "loss_parallel"),
    [("tp=2", 2, False), slow("dp_shard=2,tp=2", 4, True), slow("dp_replicate=2,tp=2", 4, True)],
)
def test_uneven_widths_equal_one_process(layout: str, num_ranks: int, loss_parallel: bool) -> None:
    run = replace(RUNS["language_model"], module=uneven_decoder, strategy={"loss_parallel": loss_parallel})
    assert_parity(run, layout, num_ranks)


@pytest.mark.parametrize(
    ("mode", "layout", "num_ranks"),
    [
        ("full", *LAYOUTS[0]),
        *(slow(mode, *layout) for mode, layout in (("selective", LAYOUTS[1]), ("full", LAYOUTS[1]))),
        slow("selective", *LAYOUTS[0]),
    ],
)
def test_recomputed_blocks_equal_one_process(mode: str, layout: str, num_ranks: int) -> None:
    # without validation, so that the first run of a block is one that is recomputed
    run = replace(NORMS, strategy={"activation_checkpointing": mode}, val_data=None)
    assert_parity(run, layout, num_ranks)


@pytest.mark.slow
def test_compiled_blocks_equal_one_process() -> None:
    assert_parity(replace(RUNS["language_model"], strategy={"compile": {"backend": "aot_eager"}}), "tp=2", 2)


class ByWidth(Classifier):
    """Its attention divides the width of its input by its number of heads, and splits by it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(WIDTH, 4 * 32),
            nn.Unflatten(1, (4, 32)),
            FAMILIES["written split"].network(),
            nn.Flatten(),
            nn.Linear(4 * 32, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


@pytest.mark.parametrize("strategy", [{}, slow({"compile": {"backend": "aot_eager"}})])
def test_attention_that_divides_its_width_equals_one_process(strategy: dict[str, Any]) -> None:
    assert_parity(Run(ByWidth, samples, strategy=strategy), "tp=2", 2)


@pytest.mark.parametrize(
    ("recipe", "layout", "num_ranks"),
    [
        ("image_classification", "tp=2", 2),
        *(slow("language_model", *layout) for layout in LAYOUTS),
    ],
)
def test_divided_positions_equal_one_process(recipe: str, layout: str, num_ranks: int) -> None:
    """Also where the positions don't divide by the ranks: see the vision transformer with norms below."""
    run = RUNS[recipe]
    trainer = {**run.trainer, "accumulate_grad_batches": 2}
    assert_parity(replace(run, strategy={"sequence_parallel": True}, trainer=trainer), layout, num_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_uneven_positions_and_recomputed_blocks_equal_one_process(mode: str) -> None:
    strategy = {"sequence_parallel": True, "activation_checkpointing": mode}
    assert_parity(replace(NORMS, strategy=strategy), "dp_shard=2,tp=2", 4)


@pytest.mark.slow
def test_divided_positions_of_four_ranks_equal_one_process() -> None:
    """17 positions: 5, 5, 5 and 2."""
    assert_parity(replace(NORMS, strategy={"sequence_parallel": True}), "tp=4", 4)


@pytest.mark.parametrize(
    ("layout", "num_ranks", "loss_parallel"),
    [slow("tp=2", 2, False), ("tp=2", 2, True), slow("dp_shard=2,tp=2", 4, True)],
)
def test_double_precision_equals_one_process_to_double_rounding(
    layout: str, num_ranks: int, loss_parallel: bool
) -> None:
    """Where float32 would hide a small error behind its rounding. (Logged values are float32 all the same.)"""
    strategy = {"sequence_parallel": True, "loss_parallel": loss_parallel}
    run = RUNS["language_model"]
    run = replace(run, trainer={**run.trainer, "precision": "64-true"}, strategy=strategy, val_data=None)
    one = one_process(run)
    for record in on_layout(run, layout, num_ranks):
        torch.testing.assert_close(record.norms, one.norms, rtol=1e-10, atol=0)
        for name, weight in one.weights.items():
            assert weight.dtype == torch.float64
            difference = (record.weights[name] - weight).norm() / weight.norm()
            assert difference <= 1e-10, f"{name}: {difference:.1e}"


@pytest.mark.parametrize(
    ("precision", "layout", "num_ranks"),
    [slow("bf16-mixed", "tp=2", 2), slow("bf16-mixed", "dp_shard=2,tp=2", 4), ("bf16-true", "tp=2", 2)],
)
def test_sixteen_bits_train_as_in_one_process(precision: str, layout: str, num_ranks: int) -> None:
    """Within one unit in the last place of bfloat16: sums are taken in another order."""
    run = RUNS["language_model"]
    run = replace(run, trainer={**run.trainer, "precision": precision}, strategy={"sequence_parallel": True})
    one = one_process(run)
    for record in on_layout(run, layout, num_ranks):
        torch.testing.assert_close(record.losses, one.losses, rtol=2**-7, atol=0)
