"""Small LightningModules, as users write them: none knows of parallelism."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torchmetrics
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

WIDTH, CLASSES = 16, 4


def samples(count: int = 64, seed: int = 3) -> Dataset:
    """Points and their classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=generator)
    return TensorDataset(x, (x[:, :CLASSES] + 0.3 * x[:, -CLASSES:]).argmax(1))


BLOCK_PLAN = {"*.up": "colwise", "*.down": "rowwise"}
"""What ``tp`` divides of the blocks below: they are too small for it to know them."""


def few_samples() -> Dataset:
    """13: divides by no number of ranks or batch size used here."""
    return samples(13, seed=4)


def wide_samples() -> Dataset:
    """In float64, for double precision."""
    x, y = samples().tensors  # type: ignore[attr-defined]
    return TensorDataset(x.double(), y)


class Block(nn.Module):
    """A residual feed-forward block."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """A stem, repeated blocks, a head."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Classifier(L.LightningModule):
    """Logs as a single-process user does: without sync_dist."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        self.lr = lr
        self.net: nn.Module = Net()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
        self.val_accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
        self.auroc = torchmetrics.AUROC("multiclass", num_classes=CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.accuracy(logits, y)
        self.log("train/accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.log("val/loss", F.cross_entropy(logits, y))
        self.log("val/count", float(len(y)), reduce_fx="sum")
        self.log("val/largest", logits.max(), reduce_fx="max")
        self.val_accuracy(logits, y)
        self.log("val/accuracy", self.val_accuracy)
        self.auroc.update(logits.softmax(-1), y)
        self.log("val/auroc", self.auroc)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(-1)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), self.lr)


class Momentum(Classifier):
    """SGD with momentum."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class Grouped(Classifier):
    """Several parameter groups and a scheduler by step."""

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 3 * self.lr}],
            self.lr,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def deep() -> L.LightningModule:
    """Six blocks, trained in groups."""
    module = Grouped()
    module.net = Net(6)
    return module


class Plateau(Classifier):
    """A scheduler that decides by a logged value."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.3)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/loss"}}


class Tied(Classifier):
    """One weight used by the first and the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.net.head = nn.Linear(WIDTH, WIDTH)
        self.net.head.weight = self.net.stem.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, :CLASSES]


class TiedBlocks(Classifier):
    """Two blocks share a weight, so they can't be sharded apart."""

    def __init__(self) -> None:
        super().__init__()
        net = Net()
        net.blocks[1].up.weight = net.blocks[0].up.weight  # type: ignore[union-attr]
        self.net = net


class Frozen(Classifier):
    """Part of the network does not train."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.net.blocks[0].parameters():  # type: ignore[index,union-attr]
            parameter.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.lr)


class Unused(Classifier):
    """A layer without influence: weight decay must not move it, as its gradient is None in one process."""

    def __init__(self) -> None:
        super().__init__()
        self.net.unused = nn.Linear(3, 3)
        self.net.blocks.append(Block())  # type: ignore[operator,union-attr]
        self.net.blocks[0].unused = nn.Linear(3, 3)  # type: ignore[index,union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = self.net.stem(x)  # type: ignore[operator]
        for block in list(self.net.blocks)[:-1]:  # type: ignore[arg-type]
            x = block(x)
        return self.net.head(self.net.norm(x))  # type: ignore[operator]


class UnusedInside(Classifier):
    """As above, but the network's own forward is called."""

    def __init__(self) -> None:
        super().__init__()
        self.net.unused = nn.Linear(3, 3)
        self.net.blocks[0].unused = nn.Linear(3, 3)  # type: ignore[index,union-attr]


class Thawing(Momentum):
    """A callback-like change of what trains, in the middle of the run."""

    def on_train_epoch_start(self) -> None:
        for parameter in self.net.blocks[0].parameters():  # type: ignore[index,union-attr]
            parameter.requires_grad_(self.current_epoch > 0)


class Flat(L.LightningModule):
    """Layers and a parameter directly in the LightningModule, as tutorials write it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, CLASSES)
        self.scale = nn.Parameter(torch.ones(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()) * self.scale

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        hidden = self.first(x)
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss, sync_dist=True)
        return {"loss": loss, "other": hidden}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({"val": F.cross_entropy(self(batch[0]), batch[1])})

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


class Adversarial(L.LightningModule):
    """Manual optimisation of two networks by two optimizers, three backward passes a step, one accumulated."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.critic = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))
        self.temperature = nn.Parameter(torch.ones(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        generator, critic = self.optimizers()  # type: ignore[misc]
        with torch.no_grad():
            fake = self.generator(x.flip(1))
        critic.zero_grad()
        self.manual_backward(F.softplus(-self.critic(x) * self.temperature).mean())
        self.manual_backward(F.softplus(self.critic(fake)).mean())
        self.clip_gradients(critic, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        self.critic(x)  # a forward without a backward before the step: what it gathered must not outlive it
        critic.step()
        generator.zero_grad()
        loss = F.softplus(-self.critic(self.generator(x.flip(1)))).mean()
        self.manual_backward(loss)
        generator.step()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss.detach()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW(self.generator.parameters(), 1e-2),
            torch.optim.AdamW([*self.critic.parameters(), self.temperature], 1e-2),
        ]


class Normalised(Classifier):
    """With BatchNorm: each rank's statistics are its own samples', as in ddp."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))


class Deferred(Classifier):
    """Built in configure_model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.net is None:
            self.net = Net()


class ByParts(Classifier):
    """Its step calls layers of the network, not the network; the unused one and its block train on nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net.unused = nn.Linear(3, 3)
        self.net.blocks.append(Block())  # type: ignore[operator,union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = self.net.stem(x)  # type: ignore[operator]
        for block in list(self.net.blocks)[:-1]:  # type: ignore[arg-type]
            x = block(x)
        return self.net.head(self.net.norm(x))  # type: ignore[operator]


class Scaled(Classifier):
    """A scalar parameter inside the network, as CLIP's."""

    def __init__(self) -> None:
        super().__init__()
        self.net.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.net.scale.exp()  # type: ignore[operator]


class Alternating(Momentum):
    """Micro-steps use different layers, so the last of a window does not see what the first used."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList(nn.Sequential(Block(), Block(), nn.Linear(WIDTH, CLASSES)) for _ in range(2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net[batch_idx % 2](x), y)  # type: ignore[index]
        self.log("loss", loss)
        return loss


def sorted_samples() -> Dataset:
    """Of every two samples the first is one kind, the second the other: two data ranks see one kind each."""
    x, y = samples().tensors  # type: ignore[attr-defined]
    x = x.clone()
    x[:, 0] = torch.where(torch.arange(len(x)) % 2 == 0, 1.0, -1.0)
    return TensorDataset(x, y)


class Routed(Momentum):
    """Samples choose the layer that they use; a rank whose samples are of one kind uses one of them only."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(3))
        self.scales = nn.ParameterList(nn.Parameter(torch.tensor(1.0 + i)) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), CLASSES)
        for expert, scale, mask in zip(self.experts, self.scales, (x[:, 0] > 0, x[:, 0] <= 0), strict=False):
            if mask.any():
                out = out.index_put((mask,), expert(x[mask]) * scale)
        return out


class RoutedBlocks(Momentum):
    """As above with blocks, which dp_shard gathers one by one: it has to refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)
        self.experts = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert, mask in zip(self.experts, (x[:, 0] > 0, x[:, 0] <= 0), strict=True):
            if mask.any():
                out = out.index_put((mask,), expert(x[mask]))
        return self.head(out)


class Sampling(Classifier):
    """Calls the network in hooks, between the steps and before the first."""

    def sample(self) -> None:
        with torch.no_grad():
            total = self.net(torch.ones(2, WIDTH)).sum() + self(torch.ones(2, WIDTH)).sum()
        self.samples = [*getattr(self, "samples", []), float(total)]

    on_train_start = on_train_epoch_end = on_validation_epoch_end = on_fit_end = sample


class SeveralDtypes(Momentum):
    """Parameters of two dtypes, those of one unused on one rank: the flags of what was used may travel apart."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, WIDTH).double()
        self.unused = nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0] > 0
        return self.net(x.index_put((chosen,), self.wide(x[chosen].double()).float()) if chosen.any() else x)


class GradientNorms(Momentum):
    """Logs the norm of every gradient, as Lightning's manual shows it."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log_dict(grad_norm(self, norm_type=2))


class Penalised(Momentum):
    """Adds a penalty over all parameters to the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        penalty = torch.stack([p.pow(2).sum() for p in self.parameters()]).sum()
        return super().training_step(batch, batch_idx) + 1e-3 * penalty


class GradientPenalty(Momentum):
    """A backward pass through a backward pass."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y) + self.penalty(x)

    def penalty(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
        return slope.pow(2).mean()


class CalledAfterPenalty(GradientPenalty):
    """The network runs again between the first backward and the second, with and without gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        penalty = self.penalty(x)
        with torch.no_grad():
            self(x)
        return penalty + F.cross_entropy(self(x), y)


class PenaltyAlone(GradientPenalty):
    """Nothing but the second backward reaches the last layer."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.penalty(batch[0])


class ManualPenalty(PenaltyAlone):
    """Two backward passes a step, each with a penalty, and a step of the optimizer after each."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        for scale in (1.0, 0.5):
            optimizer.zero_grad()
            loss = scale * self.penalty(batch[0])
            self.manual_backward(loss)
            optimizer.step()
        return loss.detach()


class BackwardWithGraph(Momentum):
    """Gradients that have a graph."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]), create_graph=True)


class Words(L.LightningModule):
    """An embedding, a backbone and a head; built at once or in ``configure_model``."""

    def __init__(self, deferred: bool = False, custom: Any = None, words: int = 10) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.deferred, self.words = deferred, words
        self.events: list[str] = []
        self.embed: Any = None
        if not deferred:
            self.build()

    def build(self) -> None:
        self.embed = nn.Embedding(self.words, 16)
        self.backbone = nn.Sequential(nn.LayerNorm(16), *(FeedForward() for _ in range(4)))
        self.head = nn.Linear(16, self.words)

    def configure_model(self) -> None:
        if self.embed is None:
            self.build()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(self.embed(x)))

    def training_step(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


class FeedForward(nn.Module):
    """A residual pair of dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def words() -> Dataset:
    """Each word and the one after it."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randint(10, (48,), generator=generator)
    return TensorDataset(x, (3 * x + 1) % 10)


class Huge(L.LightningModule):
    """Its parameters would take 400 GB."""

    def __init__(self, width: int = 100_000) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(*self._pair(width)) for _ in range(5)))

    @staticmethod
    def _pair(width: int) -> list[nn.Module]:
        return [nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1), nn.Linear(width, width)]
