"""What a step does beside its network that a microbatch, a trace or another stage must not change."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.user_code.case import Case, evaluated
from tests.user_code.networks import Block, Classifier, Manual, Net
from tests.user_code.samples import points


def numbered(size: int) -> DataLoader:
    """Points, classes, and a number that is another in each step, and the same for all samples of it."""
    x, y = points()
    return DataLoader(TensorDataset(x, y, torch.arange(len(x)) // 8), batch_size=size)


# ---------------------------------------------------------------- numbers beside tensors


class Numbers(nn.Module):
    """A network whose first part returns numbers with its tensor, or keeps them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.first, self.second = way, First(way), Net()

    def forward(self, x: Tensor, number: Tensor) -> Any:
        if self.way == "lists":
            h, (lengths, flag) = self.first(x, number)
            return self.second(h), sum(lengths) * (2.0 if flag else 1.0)
        if self.way == "kept":
            h = self.first(x, number)
            return self.second(h), self.first.scale
        h, count, flag = self.first(x, number)
        return self.second(h), count + (1.5 if flag else 0.0)


class First(nn.Module):
    """Its Python looks at the batch."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.net, self.scale = way, Net(8), 0.0

    def forward(self, x: Tensor, number: Tensor) -> Any:
        count = int(number.max())
        if self.way == "kept":
            self.scale = 0.5 * count
            return self.net(x)
        return (self.net(x), [[count, 2], count > 1]) if self.way == "lists" else (self.net(x), count, count % 2 == 0)


class WithNumbers(Classifier):
    """Weighs its loss by a number that the first half of the network returns."""

    def __init__(self, way: str) -> None:
        self.way = way
        super().__init__()

    def build(self) -> nn.Module:
        return Numbers(self.way)

    def loss(self, batch: Any) -> Tensor:
        x, y, number = batch
        logits, weight = self.net(x, number)
        self.log("weight", float(weight))
        return F.cross_entropy(logits, y) / (1 + weight)


class SetByHook(Classifier):
    """A hook of a layer keeps a number that the step reads."""

    def __init__(self) -> None:
        super().__init__()
        self.net.stem.register_forward_hook(self._count)

    @staticmethod
    def _count(layer: nn.Module, args: Any, output: Tensor) -> None:
        layer.calls = getattr(layer, "calls", 0) + 1  # type: ignore[operator, assignment]

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        return loss / self.net.stem.calls


class CountingBlock(Block):
    """Counts its calls, as layers with a schedule do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) / self.calls


class Counting(Classifier):
    """Of blocks that count, and a step that does."""

    def __init__(self) -> None:
        super().__init__()
        self.net.blocks[0] = CountingBlock()
        self.steps, self.seen = 0, []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append((self.steps, self.net.blocks[0].calls))


# ---------------------------------------------------------------- paths that change


class Branching(Classifier):
    """Runs another head, by the epoch, the batch's number, the step's, or a flag that a hook sets."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.other = way, nn.Linear(8, 4)
        self.phase, self.warm = 0, True

    def on_train_epoch_start(self) -> None:
        self.phase = self.current_epoch % 2
        self.warm = self.current_epoch == 0

    def takes_other(self, batch_idx: int) -> bool:
        return {
            "epoch": self.current_epoch > 0,
            "batch": batch_idx % 3 == 1,
            "step": self.trainer.global_step >= 3,
            "attribute": self.phase == 1,
            "flag": not self.warm,
        }[self.way]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        h = self.net.stem(x)
        for block in self.net.blocks:
            h = block(h)
        loss = F.cross_entropy(self.net.head(h), y)
        if self.takes_other(batch_idx):
            loss = loss + F.cross_entropy(self.other(h), y)
        self.log("loss", loss)
        return loss


class SkippingBlocks(Branching):
    """The same for a block before the head: what crosses a cut is another."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        h = self.net.stem(x)
        h = self.net.blocks[0](h)
        if self.takes_other(batch_idx):
            h = self.net.blocks[1](h)
        loss = F.cross_entropy(self.net.head(h), y) + 0.0 * self.other(h).sum()
        self.log("loss", loss)
        return loss


class Shrinking(Classifier):
    """Runs its first block in the first epoch only, and is cut after it or in it."""

    def loss(self, batch: Any) -> Tensor:
        h = self.net.stem(batch[0])
        if self.current_epoch == 0:
            h = self.net.blocks[0](h)
        return F.cross_entropy(self.net.head(self.net.blocks[1](h)), batch[1])


class SummedLater(Classifier):
    """A loss that is no mean over samples, from the second epoch on."""

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="sum" if self.current_epoch else "mean")


class ByValue(Classifier):
    """Runs a block where activations are large."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        h = self.net.stem(x)
        if h.norm() > 0 and batch_idx < 2:
            h = self.net.blocks[0](h)
        return F.cross_entropy(self.net.head(self.net.blocks[1](h)), y)


# ---------------------------------------------------------------- what a step leaves behind


class Keeping(Classifier):
    """Keeps a loss, a sum of losses, predictions and a dictionary in attributes, read by hooks on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.last, self.found, self.preds = 0.0, None, {}, None  # type: ignore[var-annotated]
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.total += loss.item()
        self.last, self.preds = loss.detach(), logits.argmax(1)  # type: ignore[assignment]
        self.found["mean"] = logits.detach().mean()
        return {"loss": loss, "hits": (self.preds == y).float().mean(), "logits": logits}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.last is not None
        assert self.preds is not None
        self.seen += [self.total, float(self.last), float(self.found["mean"]), float(outputs["hits"])]
        self.seen.append(float(outputs["logits"].sum()))


class Carrying(Classifier):
    """Carries a hidden state from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    def loss(self, batch: Any) -> Tensor:
        h = self.net.stem(batch[0])
        if self.hidden is not None and len(self.hidden) == len(h):
            h = h + 0.1 * self.hidden
        self.hidden = h.detach()
        for block in self.net.blocks:
            h = block(h)
        return F.cross_entropy(self.net.head(h), batch[1])


class CountingBuffer(Classifier):
    """Counts its steps in a buffer that nothing reads but a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1  # type: ignore[operator, assignment]
        return super().training_step(batch, batch_idx)


class Remembering(Block):
    """Keeps a history of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.history.append(x.shape[1])
        return super().forward(x)


class WithHistory(Classifier):
    """Has a block with a history, which a hook reads."""

    def __init__(self) -> None:
        super().__init__()
        self.net.blocks[1] = Remembering()
        self.seen: list[int] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append(len(self.net.blocks[1].history))


class Meter:
    """An average, as people write it."""

    def __init__(self) -> None:
        self.sum, self.count, self.values = 0.0, 0, []  # type: ignore[var-annotated]

    def update(self, value: Tensor) -> None:
        self.sum = self.sum + value.detach()
        self.count += 1
        self.values.append(value.detach())


class Metered(Classifier):
    """Averages its loss by an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.meter, self.seen = Meter(), []

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        self.meter.update(loss)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen += [float(self.meter.sum) / self.meter.count, float(torch.stack(self.meter.values).mean())]


class ReadsOutputs(Callback):
    """Reads what the step returned, as a callback that draws predictions does."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(outputs["logits"].std()))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.seen.append(pl_module.total)


class SummedLoss(Classifier):
    """A sum over samples."""

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="sum")


class Mixup(Classifier):
    """Mixes a batch with itself the other way round."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        logits = self(0.7 * x + 0.3 * x.flip(0))
        return 0.7 * F.cross_entropy(logits, y) + 0.3 * F.cross_entropy(logits, y.flip(0))


class Whitened(Classifier):
    """Subtracts the mean of the batch."""

    def loss(self, batch: Any) -> Tensor:
        h = self.net.stem(batch[0])
        h = h - h.mean(0)
        for block in self.net.blocks:
            h = block(h)
        return F.cross_entropy(self.net.head(h), batch[1])


# ---------------------------------------------------------------- steps that optimise by hand


class ByHand(Manual):
    """Clips, counts steps, and schedules its rate."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.2, gradient_clip_algorithm="norm")
        optimizer.step()
        self.log("norm", torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None]).norm())
        schedule: Any = self.lr_schedulers()
        schedule.step()
        self.log("loss", loss)
        self.log("rate", optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class AccumulatesByHand(Manual):
    """Steps every other batch, with torch's own clipping."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            optimizer: Any = self.optimizers()
            nn.utils.clip_grad_norm_(self.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()


# ---------------------------------------------------------------- what hooks of the fit make


class RateInStep(Classifier):
    """Weighs its loss by the optimizer's rate."""

    def loss(self, batch: Any) -> Tensor:
        rate = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        return super().loss(batch) * (1 + rate)


class MadeInFitStart(Classifier):
    """Makes class weights when the fit starts, and a copy of the network's weights for a penalty (EWC)."""

    def on_fit_start(self) -> None:
        self.weight = torch.tensor([1.0, 2.0, 0.5, 1.0])

    def on_train_epoch_start(self) -> None:
        self.scale = 1.0 + self.current_epoch

    def loss(self, batch: Any) -> Tensor:
        per_sample = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return self.scale * (self.weight[batch[1]] * per_sample).mean()


class LogsToLogger(Classifier):
    """Logs by its logger itself, every other batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx % 2 and self.logger is not None:
            self.logger.log_metrics({"own": float(self.global_step)})
        return loss


TWO_EPOCHS = {"max_epochs": 2}

CASES = [
    *(
        Case(f"{way}_beside_tensors", lambda way=way: WithNumbers(way), numbered)
        for way in ("numbers", "lists", "kept")
    ),
    Case("number_set_by_hook", SetByHook),
    Case("calls_counted", Counting),
    *(
        Case(f"branch_by_{way}", lambda way=way: Branching(way), trainer=TWO_EPOCHS)
        for way in ("epoch", "batch", "step", "attribute", "flag")
    ),
    Case("block_by_epoch", lambda: SkippingBlocks("epoch"), trainer=TWO_EPOCHS),
    Case("block_by_batch", lambda: SkippingBlocks("batch")),
    Case("cut_by_epoch", Shrinking, trainer=TWO_EPOCHS),
    Case("block_by_value", ByValue),
    Case("summed_later", SummedLater, trainer=TWO_EPOCHS, like="ddp", note="as ddp: the mean of the ranks' sums"),
    Case(
        "kept_by_the_step",
        Keeping,
        callbacks=lambda: [ReadsOutputs()],
        val=evaluated,
        like="ddp",
        note="as ddp: of the rank's own samples",
    ),
    Case("state_carried", Carrying, like="ddp", note="as ddp: of the rank's own samples"),
    Case("steps_in_buffer", CountingBuffer),
    Case("history_of_block", WithHistory),
    Case("metered", Metered, like="ddp", note="as ddp: of the rank's own samples"),
    Case("clipped_by_hand", ByHand),
    Case("every_other_by_hand", AccumulatesByHand),
    Case("rate_in_step", RateInStep),
    Case("made_in_fit_start", MadeInFitStart, trainer=TWO_EPOCHS),
    Case("logger_in_step", LogsToLogger),
    Case("summed_loss", SummedLoss, like="ddp", note="as ddp: the mean of the ranks' sums"),
    Case("mixup", Mixup, like="ddp", note="as ddp: mixed among the rank's own samples"),
    Case("whitened", Whitened, like="ddp", note="as ddp: the mean is of the rank's own samples"),
]
