"""transformers' Llama in a plain LightningModule, and ``Trainer.fit`` of it: what several benchmarks measure."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from recipes.benchmark.agreement import whole_weights
from recipes.benchmark.device import rank_device
from recipes.benchmark.interleaving import Pace, Weights


def add_llama_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of what is trained, and on how many processes."""
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--width", type=int, default=256, help="features of a token (default: 256)")
    parser.add_argument("--depth", type=int, default=6, help="blocks (default: 6)")
    parser.add_argument("--vocabulary", type=int, default=2048, help="tokens to choose from (default: 2048)")
    parser.add_argument("--batch", type=int, default=8, help="samples of a batch (default: 8)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample (default: 128)")


@dataclass(frozen=True)
class Llama:
    """transformers' Llama of some size, and the batches that it trains on.

    Args:
        width: features of a token.
        depth: blocks.
        vocabulary: tokens to choose from.
        batch: samples of a batch.
        length: tokens of a sample.
    """

    width: int
    depth: int
    vocabulary: int
    batch: int
    length: int

    def network(self) -> Any:
        """With the same weights on every rank, for every competitor."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        heads = self.width // 32
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.vocabulary,
                hidden_size=self.width,
                intermediate_size=32 * round(self.width * 8 / 3 / 32),
                num_hidden_layers=self.depth,
                num_attention_heads=heads,
                num_key_value_heads=heads // 2,
                max_position_embeddings=self.length,
                tie_word_embeddings=False,
                use_cache=False,
            )
        )

    def loader(self, num_batches: int) -> DataLoader:
        """Batches of token ids (batch, length), the same on every rank."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(self.vocabulary, (8 * self.batch, self.length), generator=generator)
        repeats = -(-num_batches // 8)
        return DataLoader(tokens.repeat(repeats, 1)[: num_batches * self.batch], batch_size=self.batch)  # type: ignore[arg-type]

    def loss(self, network: nn.Module, ids: Tensor) -> Tensor:
        """Of the next token, as a user writes it."""
        logits = network(input_ids=ids).logits
        return F.cross_entropy(logits[:, :-1].reshape(-1, self.vocabulary), ids[:, 1:].reshape(-1))


class Module(pl.LightningModule):
    """A user's module, which knows nothing of the axis."""

    def __init__(self, llama: Llama) -> None:
        super().__init__()
        self.llama, self.network = llama, llama.network()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self.llama.loss(self.network, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, as everywhere here."""
        return torch.optim.AdamW(self.network.parameters(), 1e-3)


class Ours:
    """``Trainer.fit`` of a plain LightningModule.

    Args:
        llama: what is trained.
        callbacks: that look on.
        axis: over which all ranks are laid.
        options: of HybridStrategy.
    """

    def __init__(self, llama: Llama, callbacks: tuple[Callback, ...] = (), axis: str = "tp", **options: Any) -> None:
        self.llama, self.callbacks, self.axis, self.options = llama, callbacks, axis, options

    def __call__(self, pace: Pace, num_steps: int) -> Weights:
        """Trains for so many steps."""
        ranks = dist.get_world_size()
        trainer = pl.Trainer(
            accelerator=rank_device().type,
            devices=ranks,
            strategy=HybridStrategy({self.axis: ranks}, **self.options),
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*self.callbacks, AfterStep(pace)],
        )
        module = Module(self.llama)
        trainer.fit(module, self.llama.loader(num_steps))
        return lambda: whole_weights(module.network)


class AfterStep(Callback):
    """Paces a Trainer."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """Hands on the loss."""
        self._pace(outputs["loss"])
