"""CausalLM: next-token cross entropy of any causal language model, per token and per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from recipes.configured import ConfiguredModule
from recipes.language_model.data import IGNORED, BlockData
from recipes.language_model.generation import generate
from recipes.language_model.metrics import ExponentialOfRatio, RatioOfSums
from recipes.optimization import OptimizerFactory, SchedulerFactory
from recipes.token_mean import NUM_TARGETS, add_shares, mean_over_tokens


class CausalLM(ConfiguredModule):
    """Trains a language model on the batches of :class:`recipes.language_model.data.TextData`, or of
    :class:`recipes.language_model.stored.StoredText`, which may keep documents apart, or of
    :class:`recipes.language_model.completions.PromptCompletionData`, where prompts do not count.

    Logs ``train/loss`` by step, and by epoch for ``val`` and ``test``, each exact over the held-out text:

    - ``loss``, nats per token, and ``perplexity``, its exponential;
    - ``loss_per_byte``, nats per UTF-8 byte, and ``bits_per_byte``: they compare tokenizers;
    - ``unigram_loss_per_byte``: of a model that only knows the tokens' frequencies in the training text.

    Args:
        model: makes the network, tokens ``(batch, length)`` to logits ``(batch, length, vocab_size)``, or to an
            object that has them as ``logits``, as transformers' do. Called in ``configure_model``.
        optimizer: makes the optimizer of parameter groups.
        scheduler: makes the learning rate schedule of the optimizer and ``total_steps``; ``None`` for a fixed rate.
        sample_tokens: tokens to add to each prompt in prediction.
        temperature: of the samples; 0 takes the likeliest token.
        context_length: most tokens that the model is shown when sampling.
        freeze, learning_rates: see :class:`recipes.configured.ConfiguredModule`.

    Raises:
        ValueError: on ``configure_model``, a network whose embedding lacks tokens of the data.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        *,
        sample_tokens: int = 128,
        temperature: float = 0.8,
        context_length: int | None = None,
        freeze: Sequence[str] = (),
        learning_rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(model, optimizer, scheduler, freeze, learning_rates)
        self.sample_tokens = sample_tokens
        self.temperature = temperature
        self.context_length = context_length
        self._num_tokens = 0
        self.val_metrics = _evaluation_metrics()
        self.test_metrics = _evaluation_metrics()

    def setup(self, stage: str) -> None:
        """Learns how many tokens the data have."""
        data: Any = getattr(self.trainer, "datamodule", None)
        self._num_tokens = len(data.corpus.token_bytes) if isinstance(data, BlockData) else 0

    def configure_model(self) -> None:
        """Builds the network, and refuses one whose embedding lacks tokens of the data."""
        super().configure_model()
        room = _num_embeddings(self.network)
        if room is not None and self._num_tokens > room:
            raise ValueError(
                f"the tokenizer of the data has {self._num_tokens} tokens, and the network's embedding {room}; pass "
                f"data.vocab_size={self._num_tokens}, or the tokenizer of the model"
            )

    def forward(self, tokens: Tensor, **documents: Tensor) -> Tensor:
        """Logits ``(batch, length, vocab_size)`` of tokens ``(batch, length)``.

        ``positions`` and ``document_ids`` of the same shape are for models that take them, as the recipe's decoder.
        """
        output = self.network(tokens, **documents)
        return output if isinstance(output, Tensor) else output.logits

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Has each sample know its share of the targets, where samples have different numbers of them."""
        add_shares(self, batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean nats per token."""
        logits = self(batch["inputs"], **_documents(batch))
        if NUM_TARGETS in batch:
            nats = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
            loss = mean_over_tokens(nats, batch)
        else:
            loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["inputs"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Nats, tokens and bytes of a validation batch."""
        self._evaluate("val", self.val_metrics, batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Nats, tokens and bytes of a test batch."""
        self._evaluate("test", self.test_metrics, batch)

    def predict_step(self, batch: Tensor, batch_idx: int) -> list[str] | Tensor:
        """Prompts ``(batch, length)``, continued: as texts if the data module can decode, else as tokens."""
        tokens = generate(
            self, batch, self.sample_tokens, temperature=self.temperature, context_length=self.context_length
        )
        decode = getattr(getattr(self.trainer, "datamodule", None), "decode", None)
        return tokens if decode is None else [decode(sample) for sample in tokens]

    def _evaluate(self, stage: str, metrics: nn.ModuleDict, batch: dict[str, Tensor]) -> None:
        targets = batch["targets"].flatten()
        logits = self(batch["inputs"], **_documents(batch)).flatten(0, 1).float()
        nats = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        num_tokens = (targets != IGNORED).sum()
        sums = {
            "loss": (nats, num_tokens),
            "perplexity": (nats, num_tokens),
            "loss_per_byte": (nats, batch["num_bytes"]),
            "bits_per_byte": (nats / math.log(2), batch["num_bytes"]),
            "unigram_loss_per_byte": (batch["unigram_micronats"].double() / 1e6, batch["num_bytes"]),
        }
        for name, (numerator, denominator) in sums.items():
            metric = cast(RatioOfSums, metrics[name])
            metric.update(numerator, denominator)
            self.log(f"{stage}/{name}", metric, prog_bar=name == "loss", batch_size=len(batch["inputs"]))


def _documents(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where documents are, in batches that tell."""
    return {name: batch[name] for name in ("positions", "document_ids") if name in batch}


def _num_embeddings(network: nn.Module) -> int | None:
    """Tokens that a network has an embedding of, where it is known."""
    found: Any = getattr(network, "get_input_embeddings", lambda: getattr(network, "embedding", None))()
    return found.num_embeddings if isinstance(found, nn.Embedding) else None


def _evaluation_metrics() -> nn.ModuleDict:
    metrics: dict[str, nn.Module] = {
        name: RatioOfSums() for name in ("loss", "loss_per_byte", "bits_per_byte", "unigram_loss_per_byte")
    }
    return nn.ModuleDict({**metrics, "perplexity": ExponentialOfRatio()})
