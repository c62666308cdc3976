"""What code keeps: parameters from before the fit, outputs for a later backward, tensors of a layer's inside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.user_code.case import Case
from tests.user_code.networks import Block, Classifier, Manual, Mlp, Net
from tests.user_code.samples import FEATURES, noisy_loader, points

# ---------------------------------------------------------------- outputs for a later backward


class FakeForBoth(L.LightningModule):
    """One batch of fakes for both networks: the generator ran before the critic's backward."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = Net(FEATURES), Net(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _, noise = batch
        of_generator, of_critic = self.optimizers()  # type: ignore[misc]
        of_critic.zero_grad()
        self.manual_backward(F.softplus(-self.critic(x)).mean())
        fake = self.generator(noise)
        self.manual_backward(F.softplus(self.critic(fake.detach())).mean())
        of_critic.step()
        of_generator.zero_grad()
        loss = F.softplus(-self.critic(fake)).mean()
        self.manual_backward(loss)
        of_generator.step()
        return loss.detach()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), 1e-2) for net in (self.generator, self.critic)]


class ActorCritic(L.LightningModule):
    """Both networks run first, then both optimizers step."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = Net(), Net(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        of_actor, of_critic = self.optimizers()  # type: ignore[misc]
        value, logits = self.critic(x)[:, 0], self.actor(x)
        advantage = (x[:, 0] - value).detach()
        of_critic.zero_grad()
        self.manual_backward(F.mse_loss(value, x[:, 0]))
        of_critic.step()
        of_actor.zero_grad()
        loss = -(logits.log_softmax(1).gather(1, y[:, None])[:, 0] * advantage).mean()
        self.manual_backward(loss)
        of_actor.step()
        return loss.detach()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), 1e-2) for net in (self.actor, self.critic)]


class OwnBackward(Manual):
    """``loss.backward()`` itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        optimizer.step()
        return loss.detach()


class BackwardOfSome(Manual):
    """Gradients of some parameters only."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss, inputs=list(self.net.head.parameters()))
        optimizer.step()
        return loss.detach()


class GradientClamped(Classifier):
    """By a hook that runs when a gradient is there."""

    def on_fit_start(self) -> None:
        for parameter in self.net.parameters():
            parameter.register_post_accumulate_grad_hook(_clamp)


def _clamp(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.clamp_(-0.02, 0.02)


# ---------------------------------------------------------------- parameters from before the fit


class OptimizerFromInit(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.1, momentum=0.9)

    def configure_optimizers(self) -> Any:
        return self.optimizer


class GroupsFromInit(Classifier):
    """Lists for groups, and for a penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.decayed = [p for p in self.net.parameters() if p.ndim > 1]
        self.others = {"rest": tuple(p for p in self.net.parameters() if p.ndim < 2)}

    def loss(self, batch: Any) -> Tensor:
        penalty = torch.stack([p.pow(2).sum() for p in self.decayed]).sum()
        return super().loss(batch) + 1e-2 * penalty

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.decayed, "weight_decay": 0.1}, {"params": [*self.others["rest"]]}]
        return torch.optim.SGD(groups, 0.1)


class KeptInClosure(Classifier):
    """A function that remembers the parameters."""

    def __init__(self) -> None:
        super().__init__()
        weights = [p for p in self.net.parameters() if p.ndim > 1]
        self.penalty = lambda: torch.stack([p.pow(2).sum() for p in weights]).sum()

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + 1e-2 * self.penalty()


class ListFromSetup(Callback):
    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self.parameters = list(pl_module.net.parameters())

    def on_train_batch_end(self, *args: Any) -> None:
        for parameter in self.parameters:
            parameter.data.mul_(0.95)


class NoisyWeights(Classifier):
    """The network runs with other weights than its own."""

    def loss(self, batch: Any) -> Tensor:
        generator = torch.Generator().manual_seed(self.global_step)
        weights = {
            name: p + 0.01 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for name, p in self.net.named_parameters()
        }
        return F.cross_entropy(functional_call(self.net, weights, (batch[0],)), batch[1])


# ---------------------------------------------------------------- the inside of a layer


class Watched(Mlp):
    """What it does with its hidden features, in one place."""

    def forward(self, x: Tensor) -> Any:
        return self.fc2(self.inside(F.gelu(self.fc1(x))))

    def inside(self, hidden: Tensor) -> Tensor:
        return hidden


class NormalisedByFlag(Watched):
    def __init__(self, flag: bool = False) -> None:
        super().__init__()
        self.flag = flag

    def inside(self, hidden: Tensor) -> Tensor:
        return F.layer_norm(hidden, hidden.shape[-1:]) if self.flag else hidden


class NormalisedInTraining(Watched):
    def inside(self, hidden: Tensor) -> Tensor:
        return hidden / hidden.norm(dim=-1, keepdim=True) if self.training else hidden


class KeepsHidden(Watched):
    kept: Tensor

    def inside(self, hidden: Tensor) -> Tensor:
        self.kept = hidden
        return hidden


class ReturnsEnergy(Watched):
    """Beside its output."""

    def forward(self, x: Tensor) -> Any:
        hidden = F.gelu(self.fc1(x))
        return self.fc2(hidden), hidden.pow(2).mean()


class ReadsItsWeight(Watched):
    """As quantised layers do."""

    def forward(self, x: Tensor) -> Any:
        weight = self.fc1.weight
        hidden = F.linear(x, weight + (weight.sign() * weight.abs().mean() - weight).detach(), self.fc1.bias)
        return self.fc2(F.gelu(hidden).view(-1, self.fc1.out_features))


class EnergyBlock(Block):
    energy: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y, self.energy = self.mlp(self.norm(x))
        return x + y


def with_parts(*parts: Callable[[], nn.Module], block: type[nn.Module] = Block) -> type[Classifier]:
    """A classifier whose blocks have these feed-forward parts."""

    class With(Classifier):
        def __init__(self) -> None:
            super().__init__()
            for index, part in enumerate(parts):
                self.net.blocks[index] = block()
                self.net.blocks[index].mlp = part()

        def loss(self, batch: Any) -> Tensor:
            loss = super().loss(batch)
            for own in self.net.blocks:
                if isinstance(own.mlp, KeepsHidden):
                    loss = loss + 0.1 * own.mlp.kept.norm(dim=1).mean()
                if hasattr(own, "energy"):
                    loss = loss + own.energy
            return loss

    return With


# ---------------------------------------------------------------- batches of unlike size


class OfGraphs(Classifier):
    """The mean over the nodes of each graph."""

    def loss(self, batch: Any) -> Tensor:
        nodes = self.net(batch["nodes"])
        sums = torch.zeros(len(batch["classes"]), nodes.shape[1], dtype=nodes.dtype).index_add(0, batch["graph"], nodes)
        return F.cross_entropy(sums / batch["graph"].bincount()[:, None], batch["classes"])


def graphs(size: int) -> DataLoader:
    """Graphs of two to four nodes: the first tensor of a batch is as long as there are nodes."""
    x, y = points()

    def together(indices: list[int]) -> dict[str, Tensor]:
        counts = torch.tensor([2 + index % 3 for index in indices])
        return {
            "nodes": x[indices].repeat_interleave(counts, 0),
            "graph": torch.arange(len(indices)).repeat_interleave(counts),
            "classes": y[indices],
        }

    return DataLoader(range(32), batch_size=size, collate_fn=together)  # type: ignore[arg-type]


SHARDS = ("s", "st", "rs")
TENSOR = ("t", "st")
OTHER_RESULT = dict.fromkeys(TENSOR, "gives another result than the whole")

CASES = [
    Case("fake_for_both", FakeForBoth, noisy_loader),
    Case("actor_critic", ActorCritic),
    Case("own_backward", OwnBackward, refused={"r": "manual_backward"}),
    Case("backward_of_some", BackwardOfSome, refused=dict.fromkeys(("r", *SHARDS), "inputs=")),
    Case("gradient_clamped", GradientClamped, refused={"r": "post_accumulate"}),
    Case("optimizer_from_init", OptimizerFromInit),
    Case("groups_from_init", GroupsFromInit),
    Case("kept_in_closure", KeptInClosure, refused=dict.fromkeys((*SHARDS, "t"), "holds the parameter")),
    Case("list_from_setup", Classifier, callbacks=lambda: [ListFromSetup()]),
    Case("noisy_weights", NoisyWeights, refused=dict.fromkeys((*SHARDS, "t"), "functional_call")),
    Case("part_by_flag", with_parts(NormalisedByFlag, partial(NormalisedByFlag, True)), refused=OTHER_RESULT),
    Case("part_in_training", with_parts(NormalisedInTraining, NormalisedInTraining), refused=OTHER_RESULT),
    Case("part_keeps", with_parts(KeepsHidden, KeepsHidden), refused=dict.fromkeys(TENSOR, "keeps kept")),
    Case("part_returns_more", with_parts(ReturnsEnergy, ReturnsEnergy, block=EnergyBlock), refused=OTHER_RESULT),
    Case("part_reads_weight", with_parts(ReadsItsWeight, ReadsItsWeight), refused=OTHER_RESULT),
    Case("graphs", OfGraphs, graphs),
]
