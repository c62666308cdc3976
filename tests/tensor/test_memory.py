"""What a rank of the tensor axis holds, and how large the largest tensor of a step gets."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from recipes.benchmark.memory import HeldBytes
from recipes.language_model import CausalLM
from recipes.language_model.decoder import Decoder
from tests.recipes.runs import LENGTH, VOCABULARY, Blocks
from tests.support.parity import QUIET
from tests.support.ranks import run_on_ranks

BATCH, WIDTH, LARGE = 8, 32, 4096


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that an operator returns while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.nbytes for leaf in tree_leaves(result) if type(leaf) is Tensor]
        self.num_bytes = max([self.num_bytes, *sizes])
        return result


class LargestOfStep(Callback):
    """Of a training step and its backward pass, after the first."""

    def __init__(self) -> None:
        self.mode = LargestTensor()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx:  # the first run of a part is compared with the whole one
            self.mode.__enter__()

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step:
            self.mode.__exit__(None, None, None)


def decoder(vocabulary: int) -> L.LightningModule:
    network = partial(Decoder, vocabulary, width=WIDTH, depth=2, num_heads=4, num_kv_heads=2, feed_forward_width=96)
    return CausalLM(network, partial(torch.optim.AdamW, lr=1e-3))


def _fit(layout: str, callback: Callback, vocabulary: int, **options: Any) -> None:
    strategy = HybridStrategy(layout, **options)
    trainer = L.Trainer(**QUIET, devices=dist.get_world_size(), strategy=strategy, callbacks=[callback], max_steps=3)
    trainer.fit(decoder(vocabulary), DataLoader(Blocks(64), batch_size=BATCH))


def _held() -> tuple[dict[str, int], dict[str, int]]:
    held = HeldBytes(divided=True)
    _fit("tp=2", held, VOCABULARY)
    return held.held, held.whole


def test_a_rank_holds_its_part_of_what_is_divided() -> None:
    for held, whole in run_on_ranks(2, _held):
        assert set(held) == {"parameters", "gradients", "optimizer states"}
        for what, num_bytes in held.items():
            assert num_bytes <= 1.02 * whole[what] / 2, what


def _largest(loss_parallel: bool) -> int:
    largest = LargestOfStep()
    _fit("tp=2", largest, LARGE, loss_parallel=loss_parallel)
    return largest.mode.num_bytes


@pytest.mark.parametrize("loss_parallel", [True, False])
def test_the_whole_logits_are_made_only_without_loss_parallel(loss_parallel: bool) -> None:
    logits = BATCH * LENGTH * LARGE * 4
    for num_bytes in run_on_ranks(2, _largest, loss_parallel):
        assert num_bytes == (logits // 2 if loss_parallel else logits)
