"""Networks that follow another one: BYOL, MoCo, DINO, SwAV, DQN, distillation."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.user_code.case import Case
from tests.user_code.networks import Classifier, Net, Transformer
from tests.user_code.samples import CLASSES, FEATURES, loader, noisy_loader

TAU = 0.9


class Byol(L.LightningModule):
    """A target network that follows by ``p.data =``."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.predictor = Net(FEATURES), nn.Linear(FEATURES, FEATURES)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _, noise = batch
        with torch.no_grad():
            wanted = F.normalize(self.target(x + 0.1 * noise), dim=1)
        loss = (F.normalize(self.predictor(self.online(x)), dim=1) - wanted).pow(2).sum(1).mean()
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        self.follow([*self.target.parameters()], [*self.online.parameters()])

    def follow(self, target: list[nn.Parameter], online: list[nn.Parameter]) -> None:
        for mine, theirs in zip(target, online, strict=True):
            mine.data = TAU * mine.data + (1 - TAU) * theirs.data

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.online.parameters(), *self.predictor.parameters()], 0.3)


class ByolInPlace(Byol):
    def follow(self, target: list[nn.Parameter], online: list[nn.Parameter]) -> None:
        for mine, theirs in zip(target, online, strict=True):
            mine.data.mul_(TAU).add_(theirs.data, alpha=1 - TAU)


class ByolLerp(Byol):
    @torch.no_grad()
    def follow(self, target: list[nn.Parameter], online: list[nn.Parameter]) -> None:
        for mine, theirs in zip(target, online, strict=True):
            mine.lerp_(theirs, 1 - TAU)


class ByolForeach(Byol):
    @torch.no_grad()
    def follow(self, target: list[nn.Parameter], online: list[nn.Parameter]) -> None:
        torch._foreach_mul_(target, TAU)
        torch._foreach_add_(target, online, alpha=1 - TAU)


class ByolStateDict(Byol):
    """Follows by way of the state dict."""

    def follow(self, target: list[nn.Parameter], online: list[nn.Parameter]) -> None:
        theirs = self.online.state_dict()
        self.target.load_state_dict({n: TAU * p + (1 - TAU) * theirs[n] for n, p in self.target.state_dict().items()})


class Moco(L.LightningModule):
    """The key network follows inside of the step; keys of all ranks go into a queue."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = Net(FEATURES)
        self.keys = copy.deepcopy(self.queries).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(16, FEATURES), dim=1))
        self.place = 0

    @torch.no_grad()
    def follow(self) -> None:
        for key, query in zip(self.keys.parameters(), self.queries.parameters(), strict=True):
            key.data = key.data * TAU + query.data * (1 - TAU)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        keys = self.all_gather(keys).reshape(-1, FEATURES)
        self.queue[self.place : self.place + len(keys)] = keys
        self.place = (self.place + len(keys)) % len(self.queue)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _, noise = batch
        queries = F.normalize(self.queries(x), dim=1)
        with torch.no_grad():
            self.follow()
            keys = F.normalize(self.keys(x + 0.1 * noise), dim=1)
        logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ self.queue.clone().T], 1) / 0.2
        self.enqueue(keys)
        loss = F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.queries.parameters(), 0.1)


class MocoInPlace(Moco):
    @torch.no_grad()
    def follow(self) -> None:
        for key, query in zip(self.keys.parameters(), self.queries.parameters(), strict=True):
            key.mul_(TAU).add_(query, alpha=1 - TAU)


class Swav(L.LightningModule):
    """Prototypes are normalised at the beginning of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.prototypes = Net(FEATURES), nn.Linear(FEATURES, 6, bias=False)

    @torch.no_grad()
    def normalise(self) -> None:
        weight = F.normalize(self.prototypes.weight.data.clone(), dim=1)
        self.prototypes.weight.copy_(weight)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.normalise()
        x, _, noise = batch
        scores = [self.prototypes(F.normalize(self.encoder(view), dim=1)) for view in (x, x + 0.1 * noise)]
        return F.cross_entropy(scores[0] / 0.1, (scores[1].detach() / 0.05).softmax(1))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class SwavInHook(Swav):
    """The same in a hook, as pl_bolts has it."""

    def on_train_batch_start(self, *args: Any) -> None:
        super().normalise()

    def normalise(self) -> None:
        pass


class SwavGradients(Swav):
    """Prototypes stand still in the first steps: their gradients are dropped."""

    def on_after_backward(self) -> None:
        if self.global_step < 2:
            for name, parameter in self.named_parameters():
                if "prototypes" in name:
                    parameter.grad = None


class Dino(Byol):
    """A centre of the teacher's outputs, over all ranks, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(1, FEATURES))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _, noise = batch
        with torch.no_grad():
            teacher = self.target(x + 0.1 * noise)
            wanted = ((teacher - self.centre) / 0.1).softmax(1)
            mean = self.all_gather(teacher).reshape(-1, FEATURES).mean(0, keepdim=True)
            self.centre = self.centre * TAU + mean * (1 - TAU)
        return F.cross_entropy(self.predictor(self.online(x)), wanted)


class Distilled(Classifier):
    """A frozen teacher in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = Transformer().requires_grad_(False).eval()

    def loss(self, batch: Any) -> Tensor:
        with torch.no_grad():
            soft = (self.teacher(batch[0]) / 2).softmax(1)
        return super().loss(batch) + F.kl_div((self(batch[0]) / 2).log_softmax(1), soft, reduction="batchmean")


class Dqn(L.LightningModule):
    """The target network is overwritten by ``load_state_dict`` every other step."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.target = Net(CLASSES), Net(CLASSES)
        self.target.load_state_dict(self.net.state_dict())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        state, action, following = batch
        value = self.net(state).gather(1, action[:, None])[:, 0]
        with torch.no_grad():
            best = self.target(following).max(1)[0]
        loss = F.smooth_l1_loss(value, state[:, 0] + 0.9 * best)
        if self.global_step % 2 == 1:
            self.target.load_state_dict(self.net.state_dict())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), 1e-2)


CASES = [
    Case("byol_assigned", Byol, noisy_loader),
    Case("byol_in_place", ByolInPlace, noisy_loader),
    Case("byol_lerp", ByolLerp, noisy_loader),
    Case("byol_foreach", ByolForeach, noisy_loader),
    Case("byol_state_dict", ByolStateDict, noisy_loader),
    Case("moco_assigned", Moco, noisy_loader, left_out="final queue", note="the queue's order is that of ranks"),
    Case("moco_in_place", MocoInPlace, noisy_loader, left_out="final queue"),
    Case("swav_step", Swav, noisy_loader),
    Case("swav_hook", SwavInHook, noisy_loader),
    Case("swav_frozen_prototypes", SwavGradients, noisy_loader),
    Case("dino", Dino, noisy_loader),
    Case("distillation", Distilled, loader),
    Case("dqn", Dqn, noisy_loader),
]
