"""Weights in the loss, gradients in the loss, and weights changed by hand between steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.user_code.case import Case
from tests.user_code.networks import Classifier, TransformerClassifier


class Penalised(Classifier):
    """A penalty on the weights in the loss."""

    def penalty(self) -> Tensor:
        raise NotImplementedError

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + 1e-2 * self.penalty()


class L1(Penalised):
    def penalty(self) -> Tensor:
        return sum(p.abs().sum() for p in self.parameters())  # type: ignore[return-value]


class L2(Penalised):
    def penalty(self) -> Tensor:
        return torch.stack([p.norm() ** 2 for name, p in self.named_parameters() if "bias" not in name]).sum()


class L2OfTransformer(L2, TransformerClassifier):
    """The same where q, k and v are packed into one matrix."""


class Orthogonal(Penalised):
    def penalty(self) -> Tensor:
        total = torch.zeros(())
        for module in self.modules():
            if isinstance(module, nn.Linear):
                w = module.weight
                total = total + (w @ w.T - torch.eye(len(w))).pow(2).sum()
        return total


class SpectralPenalty(Penalised):
    def penalty(self) -> Tensor:
        return sum(torch.linalg.matrix_norm(p, 2) for p in self.net.blocks.parameters() if p.ndim == 2)


class GroupLasso(Penalised):
    """Norms of the rows of the blocks' first layers."""

    def penalty(self) -> Tensor:
        return sum(block.mlp.fc1.weight.norm(dim=1).sum() for block in self.net.blocks)


class Ewc(Penalised):
    """Elastic weight consolidation: stays near the weights that the fit began with."""

    def on_fit_start(self) -> None:
        self.anchor = {name: p.detach().clone() for name, p in self.named_parameters()}

    def penalty(self) -> Tensor:
        return sum((p - self.anchor[name]).pow(2).sum() for name, p in self.named_parameters())  # type: ignore


class InputGradientPenalty(Classifier):
    def loss(self, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(self(x), batch[1], reduction="sum"), x, create_graph=True)
        return super().loss(batch) + slope.pow(2).sum(1).mean()


class WeightGradientPenalty(Classifier):
    """The norm of the gradient itself in the loss, of a quadratic in the outputs."""

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        slopes = torch.autograd.grad(loss, [self.net.head.weight], create_graph=True)
        return loss + 0.1 * slopes[0].pow(2).sum()


class FastGradientSign(Classifier):
    """Trains on what an attack makes of the samples."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(self(x), y), x)
        return F.cross_entropy(self((x + 0.1 * slope.sign()).detach()), y)


class MaxNorm(Classifier):
    """Rows of weights are kept short, after each step."""

    def on_train_batch_end(self, *args: Any) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = module.weight.data.renorm(2, 0, 0.5)


class Clamped(Classifier):
    def on_train_batch_end(self, *args: Any) -> None:
        for parameter in self.parameters():
            parameter.data.clamp_(-0.2, 0.2)


class NormKept(Classifier):
    """Each weight is scaled back to the length that it had."""

    def on_fit_start(self) -> None:
        self.lengths = [p.norm().item() for p in self.parameters()]

    @torch.no_grad()
    def on_train_batch_end(self, *args: Any) -> None:
        for parameter, length in zip(self.parameters(), self.lengths, strict=True):
            parameter.mul_(length / max(parameter.norm().item(), 1e-6))


class NoisyWeights(Classifier):
    """Noise is put on the weights before a step's forward and taken away after its backward."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        generator = torch.Generator().manual_seed(batch_idx)
        self.noise = [0.01 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in self.parameters()]
        for parameter, noise in zip(self.parameters(), self.noise, strict=True):
            parameter.data.add_(noise)

    @torch.no_grad()
    def on_after_backward(self) -> None:
        for parameter, noise in zip(self.parameters(), self.noise, strict=True):
            parameter.sub_(noise)


class Shrunk(Classifier):
    """Shrink and perturb: weights of an epoch go on smaller, by random numbers that all ranks draw alike."""

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(self.current_epoch)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.8).add_(0.01 * torch.randn_like(parameter))


CASES = [
    Case("l1_penalty", L1),
    Case("l2_penalty", L2),
    Case("l2_penalty_transformer", L2OfTransformer),
    Case("orthogonality_penalty", Orthogonal),
    Case("spectral_penalty", SpectralPenalty),
    Case("group_lasso", GroupLasso),
    Case("elastic_weight_consolidation", Ewc),
    Case(
        "input_gradient_penalty",
        InputGradientPenalty,
    ),
    Case("weight_gradient_penalty", WeightGradientPenalty, like="ddp", note="as ddp: of the rank's own samples"),
    Case("fast_gradient_sign", FastGradientSign),
    Case("max_norm", MaxNorm),
    Case("clamped_weights", Clamped),
    Case("norms_kept", NormKept),
    Case("weight_noise", NoisyWeights),
    Case("shrink_and_perturb", Shrunk, trainer={"max_epochs": 2}),
]
