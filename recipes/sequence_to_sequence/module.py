"""Seq2Seq: an encoder-decoder trained by cross entropy, and what it generates beside references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.text import BLEUScore, CHRFScore, WordErrorRate

from recipes.configured import ConfiguredModule
from recipes.language_model.data import IGNORED
from recipes.language_model.metrics import ExponentialOfRatio, RatioOfSums
from recipes.optimization import OptimizerFactory, SchedulerFactory
from recipes.sequence_to_sequence.generation import beam_search
from recipes.sequence_to_sequence.vocabulary import END, PADDING
from recipes.token_mean import add_shares, mean_over_tokens


class Seq2Seq(ConfiguredModule):
    """Trains an encoder-decoder of transformers on the batches of :class:`recipes.sequence_to_sequence.data.PairData`.

    The loss is the mean over all targets of a batch, of all data ranks, see [Note: mean over tokens]. Logs
    ``train/loss`` by step, and by epoch for ``val`` and ``test``, each exact over the held-out pairs:

    - ``loss``, nats per target token, and ``perplexity``, its exponential;
    - ``accuracy`` of the next token, of which those before it are given;

    and for ``test``, of what it generates, greedily or by beam search, beside the true texts, so that a word which the
    vocabulary lacks is an error:

    - ``word_error_rate``, edits by words to the reference, over the words of all references;
    - ``exact_match``, the share of pairs without any;
    - ``bleu`` (4-grams of words) and ``chrf`` (6-grams of characters, https://aclanthology.org/W15-3049).

    Args:
        model: makes the network, called with ``input_ids``, ``attention_mask`` and ``decoder_input_ids``, which gives
            an object with ``logits``. Called in ``configure_model``.
        optimizer: makes the optimizer of parameter groups.
        scheduler: makes the learning rate schedule of the optimizer and ``total_steps``; ``None`` for a fixed rate.
        num_beams: of beam search; 1 is greedy.
        max_length: most tokens of what is generated.
        generate: whether tests measure what it generates.
        freeze, learning_rates: see :class:`recipes.configured.ConfiguredModule`.

    Raises:
        ValueError: on ``setup``, under ``pp`` with ``generate``.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        *,
        num_beams: int = 1,
        max_length: int = 64,
        generate: bool = True,
        freeze: Sequence[str] = (),
        learning_rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(model, optimizer, scheduler, freeze, learning_rates)
        self.num_beams, self.max_length, self.generates = num_beams, max_length, generate
        self.val_metrics, self.test_metrics = _token_metrics(), _token_metrics()
        self.text_metrics = nn.ModuleDict(
            {"word_error_rate": WordErrorRate(), "bleu": BLEUScore(), "chrf": CHRFScore()}
        )
        self.exact_match = RatioOfSums()

    def setup(self, stage: str) -> None:
        """Refuses a layout under which it can't generate, before it trains."""
        layout = getattr(self.trainer.strategy, "layout", None)
        if getattr(layout, "pp", 1) > 1 and (self.generates or stage == "predict"):
            raise ValueError(
                "under pp a step calls its network once, and generation takes a call for each token; pass "
                "recipe.generate=false, and test or predict with the checkpoint under another layout"
            )

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits ``(batch, target length, vocab_size)``."""
        output: Any = self.network(
            input_ids=batch["sources"], attention_mask=batch["source_mask"], decoder_input_ids=batch["inputs"]
        )
        return output.logits

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Has each pair know its share of the targets, where pairs have different numbers of them."""
        add_shares(self, batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean nats per target token."""
        loss = mean_over_tokens(_nats(self(batch), batch["targets"]), batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["sources"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Nats and right tokens of a validation batch."""
        self._evaluate("val", self.val_metrics, batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Nats and right tokens of a test batch, and translations of its sources beside the targets."""
        self._evaluate("test", self.test_metrics, batch)
        if not self.generates:
            return
        data: Any = getattr(self.trainer, "datamodule", None)
        translations, targets = self._translations(batch), data.references(batch)
        for name, metric in self.text_metrics.items():
            references = targets if name == "word_error_rate" else [[target] for target in targets]
            cast(Metric, metric).update(translations, references)
            self.log(f"test/{name}", cast(Metric, metric), batch_size=len(translations))
        same = [float(one == other) for one, other in zip(translations, targets, strict=True)]
        self.exact_match.update(batch["num_targets"].new_tensor(same), batch["num_targets"].new_ones(len(same)))
        self.log("test/exact_match", self.exact_match, batch_size=len(translations))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[str]:
        """``source -> translation``, of each pair."""
        return [f"{s} -> {t}" for s, t in zip(self._texts(batch["sources"]), self._translations(batch), strict=True)]

    def _translations(self, batch: dict[str, Tensor]) -> list[str]:
        return self._texts(self.generate(batch["sources"], batch["source_mask"]))

    def generate(self, sources: Tensor, source_mask: Tensor) -> Tensor:
        """Translations of sources ``(batch, length)``: tokens ``(batch, max_length)``, of which those after the end do
        not count.
        """
        encoded: list[Tensor] = []

        def next_logits(rows: Tensor, inputs: Tensor) -> Tensor:
            given: dict[str, Any] = {"input_ids": sources[rows]}
            if encoded:
                given = {"encoder_outputs": (encoded[0],)}
            output: Any = self.network(**given, attention_mask=source_mask[rows], decoder_input_ids=inputs)
            if not encoded:
                encoded.append(output.encoder_last_hidden_state)
            return output.logits[:, -1]

        options = {"start": PADDING, "end": END, "num_beams": self.num_beams, "device": sources.device}
        return beam_search(next_logits, len(sources), self.max_length, **options)  # type: ignore[arg-type]

    def _texts(self, tokens: Tensor) -> list[str]:
        data: Any = getattr(self.trainer, "datamodule", None)
        return data.decode(tokens)

    def _evaluate(self, stage: str, metrics: nn.ModuleDict, batch: dict[str, Tensor]) -> None:
        targets = batch["targets"]
        logits = self(batch)
        nats, counts = _nats(logits, targets), targets != IGNORED
        right = (logits.argmax(-1) == targets) & counts
        for name, numerator in (("loss", nats), ("perplexity", nats), ("accuracy", right)):
            metric = cast(RatioOfSums, metrics[name])
            metric.update(numerator, counts)
            self.log(f"{stage}/{name}", metric, prog_bar=name == "loss", batch_size=len(targets))


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of each target, ``(batch, length)``."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)


def _token_metrics() -> nn.ModuleDict:
    metrics: dict[str, nn.Module] = {"loss": RatioOfSums(), "accuracy": RatioOfSums()}
    return nn.ModuleDict({**metrics, "perplexity": ExponentialOfRatio()})
