"""Adversarial training, as Lightning's examples and the papers' repositories write it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.user_code.case import Case
from tests.user_code.networks import Net
from tests.user_code.samples import CLASSES, FEATURES, noisy_loader


class Gan(L.LightningModule):
    """Two optimizers by hand, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = Net(FEATURES), Net(1)

    def critic_loss(self, x: Tensor, z: Tensor) -> Tensor:
        fake = self.generator(z).detach()
        return F.softplus(-self.critic(x)).mean() + F.softplus(self.critic(fake)).mean()

    def generator_loss(self, z: Tensor) -> Tensor:
        return F.softplus(-self.critic(self.generator(z))).mean()

    def step(self, optimizer: Any, loss: Tensor) -> Tensor:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _, z = batch
        generator, critic = self.optimizers()  # type: ignore[misc]
        self.log("critic", self.step(critic, self.critic_loss(x, z)))
        return self.step(generator, self.generator_loss(z))

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.generator.parameters(), 1e-2, betas=(0.5, 0.9)),
            torch.optim.Adam(self.critic.parameters(), 1e-2, betas=(0.5, 0.9)),
        ]


class ToggledGan(Gan):
    """Lightning's own example: toggle_optimizer and untoggle_optimizer."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _, z = batch
        generator, critic = self.optimizers()  # type: ignore[misc]
        self.toggle_optimizer(generator)
        loss = self.step(generator, self.generator_loss(z))
        self.untoggle_optimizer(generator)
        self.toggle_optimizer(critic)
        self.step(critic, self.critic_loss(x, z))
        self.untoggle_optimizer(critic)
        return loss


class ToggledInContextGan(Gan):
    """The same with the context manager."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _, z = batch
        generator, critic = self.optimizers()  # type: ignore[misc]
        with self.toggled_optimizer(generator):
            loss = self.step(generator, self.generator_loss(z))
        with self.toggled_optimizer(critic):
            self.step(critic, self.critic_loss(x, z))
        return loss


def set_requires_grad(networks: Iterable[nn.Module], requires_grad: bool) -> None:
    """CycleGAN's."""
    for network in networks:
        for parameter in network.parameters():
            parameter.requires_grad = requires_grad


class CycleGan(L.LightningModule):
    """Two generators and two critics, which are frozen while the generators train."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.there, self.back = Net(FEATURES), Net(FEATURES)
        self.critics = nn.ModuleList([Net(1), Net(1)])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        a, _, b = batch
        generators, critics = self.optimizers()  # type: ignore[misc]
        set_requires_grad(self.critics, False)
        fake_b, fake_a = self.there(a), self.back(b)
        loss = (self.critics[0](fake_a) - 1).pow(2).mean() + (self.critics[1](fake_b) - 1).pow(2).mean()
        loss = loss + F.l1_loss(self.back(fake_b), a) + F.l1_loss(self.there(fake_a), b)
        generators.zero_grad()
        self.manual_backward(loss)
        generators.step()
        set_requires_grad(self.critics, True)
        critics.zero_grad()
        for critic, real, fake in zip(self.critics, (a, b), (fake_a, fake_b), strict=True):
            self.manual_backward((critic(real) - 1).pow(2).mean() + critic(fake.detach()).pow(2).mean())
        critics.step()
        return loss.detach()

    def configure_optimizers(self) -> Any:
        both = [*self.there.parameters(), *self.back.parameters()]
        return [torch.optim.Adam(both, 1e-2), torch.optim.Adam(self.critics.parameters(), 1e-2)]


class WassersteinGradientPenalty(Gan):
    """WGAN-GP: a backward pass through a backward pass; the generator trains every other step."""

    def critic_loss(self, x: Tensor, z: Tensor) -> Tensor:
        fake = self.generator(z).detach()
        weight = z[:, :1].sigmoid()
        between = (weight * x + (1 - weight) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).pow(2).mean()
        return self.critic(fake).mean() - self.critic(x).mean() + 10 * penalty

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _, z = batch
        generator, critic = self.optimizers()  # type: ignore[misc]
        loss = self.step(critic, self.critic_loss(x, z))
        if batch_idx % 2:
            self.log("generator", self.step(generator, -self.critic(self.generator(z)).mean()))
        return loss


class WassersteinClipped(Gan):
    """The first WGAN: the critic's weights are clamped after each of its steps."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _, z = batch
        generator, critic = self.optimizers()  # type: ignore[misc]
        self.step(critic, self.critic(self.generator(z).detach()).mean() - self.critic(x).mean())
        for parameter in self.critic.parameters():
            parameter.data.clamp_(-0.1, 0.1)
        return self.step(generator, -self.critic(self.generator(z)).mean())


class Reversed(torch.autograd.Function):
    """The identity, with the gradient turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -gradient


class DomainAdversarial(L.LightningModule):
    """DANN: one optimizer, gradients of the domain's loss reversed."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.classes, self.domains = Net(FEATURES), nn.Linear(FEATURES, CLASSES), Net(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        source, y, target = batch
        domain = F.softplus(-self.domains(Reversed.apply(self.features(source)))).mean()
        domain = domain + F.softplus(self.domains(Reversed.apply(self.features(target)))).mean()
        self.log("domain", domain)
        return F.cross_entropy(self.classes(self.features(source)), y) + 0.3 * domain

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


CASES = [
    Case("gan", Gan, noisy_loader),
    Case("gan_toggle_optimizer", ToggledGan, noisy_loader),
    Case("gan_toggled_optimizer", ToggledInContextGan, noisy_loader),
    Case("cyclegan_set_requires_grad", CycleGan, noisy_loader),
    Case(
        "wgan_gradient_penalty",
        WassersteinGradientPenalty,
        noisy_loader,
    ),
    Case("wgan_clamped_weights", WassersteinClipped, noisy_loader),
    Case("domain_adversarial", DomainAdversarial, noisy_loader),
]
