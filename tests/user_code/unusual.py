"""Steps that stop or skip, dtypes beside each other, layers without a shape yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.user_code.case import LAYOUTS, Case
from tests.user_code.networks import Classifier, Net
from tests.user_code.samples import FEATURES, noisy_loader


class Skips(Classifier):
    """A step that returns None on every rank."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class StopsOnOneRank(Classifier):
    """Ends the training where only one rank sees why."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1 and self.global_rank == 0:
            self.trainer.should_stop = True


class StepStops(Classifier):
    """The same on every rank, in a step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


class Complex(Classifier):
    """A spectral layer with complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.randn(FEATURES // 2 + 1, dtype=torch.cfloat) * 0.1 + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.fft.irfft(torch.fft.rfft(x) * self.spectrum, n=FEATURES))


class SeveralDtypes(Classifier):
    """A layer in double precision beside others."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(FEATURES, FEATURES).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.wide(x.double()).float())


class Lazy(Classifier):
    """A layer that learns its shape from a first forward in ``setup``, as Lightning advises."""

    def __init__(self) -> None:
        super().__init__()
        self.net.stem = nn.LazyLinear(FEATURES)

    def setup(self, stage: str) -> None:
        torch.manual_seed(0)
        with torch.no_grad():
            self(torch.zeros(1, FEATURES))


class LazyStill(Classifier):
    """The same without."""

    def __init__(self) -> None:
        super().__init__()
        self.net.stem = nn.LazyLinear(FEATURES)


class DictionaryStep(Classifier):
    """Returns more than the loss, which a hook reads."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits.detach()}

    def on_train_batch_end(self, outputs: Any, *args: Any) -> None:
        self.log("spread", outputs["logits"].pow(2).mean())


class Unused(Classifier):
    """A part that no step uses, and one that only some do."""

    def __init__(self) -> None:
        super().__init__()
        self.never, self.sometimes = Net(), Net()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss + F.cross_entropy(self.sometimes(batch[0]), batch[1]) if batch_idx % 2 else loss


class Tied(Classifier):
    """The head is the stem, turned round."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net.stem(x)
        for block in self.net.blocks:
            hidden = block(hidden)
        return (hidden @ self.net.stem.weight)[:, :4] + self.net.head(hidden)


class WrittenInValidation(Classifier):
    """Projects weights in a hook of validation."""

    def on_validation_epoch_end(self) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.9)


class DataInHook(Classifier):
    """Changes the batch, and calls the network, in hooks before the step."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 1.5, *batch[1:]]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            self.log("before", F.cross_entropy(self(batch[0]), batch[1]))
        return -1 if batch_idx == 3 else None


class NamedInHook(Classifier):
    """Its steps take names, which a hook before the transfer gives."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"points": batch[0], "classes": batch[1]}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch["points"], batch["classes"]), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return super().validation_step((batch["points"], batch["classes"]), batch_idx)


EVERY = tuple(LAYOUTS)

CASES = [
    Case("step_returns_none", Skips),
    Case("should_stop_on_one_rank", StopsOnOneRank, trainer={"max_epochs": 2}),
    Case("should_stop", StepStops, trainer={"max_epochs": 2}),
    Case("complex_parameters", Complex, precision="32-true"),
    Case("several_dtypes", SeveralDtypes, precision="32-true"),
    Case("lazy_layer", Lazy),
    Case("lazy_layer_without_shape", LazyStill, refused=dict.fromkeys(EVERY, "[Ll]azy|uninitiali")),
    Case("step_returns_dictionary", DictionaryStep),
    Case("unused_parts", Unused),
    Case("weight_used_twice", Tied),
    Case(
        "weights_written_in_validation",
        WrittenInValidation,
        val=lambda _: noisy_loader(4, 12),
        trainer={"max_epochs": 2},
    ),
    Case("hooks_of_batches", DataInHook),
    Case("named_in_hook", NamedInHook),
]
