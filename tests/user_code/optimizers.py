"""Optimizers of torch and of users: by element, by whole parameter, by all parameters at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from tests.user_code.case import Case
from tests.user_code.networks import Classifier, Manual, Net, Transformer


class Own(Optimizer):
    """What users' optimizers share: one rate, one rule for a parameter and its gradient."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, group["lr"])
        return loss

    def update(self, parameter: Tensor, gradient: Tensor, lr: float) -> None:
        raise NotImplementedError


class Sign(Own):
    def update(self, parameter: Tensor, gradient: Tensor, lr: float) -> None:
        parameter.add_(gradient.sign(), alpha=-0.1 * lr)


class Lars(Own):
    """A rate for each parameter, by its length."""

    def update(self, parameter: Tensor, gradient: Tensor, lr: float) -> None:
        ratio = parameter.norm() / (gradient.norm() + 1e-9)
        parameter.add_(gradient * torch.where(parameter.norm() > 0, ratio, 1.0), alpha=-0.1 * lr)


class Lamb(Own):
    """Adam's direction with a rate by length, which it reads as numbers."""

    def update(self, parameter: Tensor, gradient: Tensor, lr: float) -> None:
        state = self.state[parameter]
        if not state:
            state["first"], state["second"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["first"].mul_(0.9).add_(gradient, alpha=0.1)
        state["second"].mul_(0.99).addcmul_(gradient, gradient, value=0.01)
        direction = state["first"] / (state["second"].sqrt() + 1e-6) + 0.01 * parameter
        length, other = parameter.norm().item(), direction.norm().item()
        parameter.add_(direction, alpha=-0.1 * lr * (length / other if length > 0 and other > 0 else 1.0))


class ClippedByParameter(Own):
    def update(self, parameter: Tensor, gradient: Tensor, lr: float) -> None:
        torch.nn.utils.clip_grad_norm_(parameter, 0.1)
        parameter.add_(parameter.grad, alpha=-lr)  # type: ignore[arg-type]


class UnitwiseClipped(Own):
    """Adaptive gradient clipping: rows of a gradient by the length of the weight's rows."""

    def update(self, parameter: Tensor, gradient: Tensor, lr: float) -> None:
        if gradient.ndim > 1:
            most = 0.1 * parameter.norm(dim=1, keepdim=True).clamp(min=1e-3)
            gradient = gradient * (most / gradient.norm(dim=1, keepdim=True).clamp(min=1e-6)).clamp(max=1.0)
        parameter.sub_(lr * gradient)


class Centralised(Own):
    """Gradient centralisation: rows have the mean zero."""

    def update(self, parameter: Tensor, gradient: Tensor, lr: float) -> None:
        if gradient.ndim > 1:
            gradient = gradient - gradient.mean(1, keepdim=True)
        parameter.add_(gradient, alpha=-lr)


class Normalised(Own):
    """A step of one length, over all parameters together."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        assert closure is not None
        with torch.enable_grad():
            loss = closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        self.length = torch.sqrt(sum((g**2).sum() for g in gradients))  # type: ignore[arg-type]
        for parameter in self.param_groups[0]["params"]:
            parameter -= 0.1 * parameter.grad / self.length
        return loss


class Lookahead(Optimizer):
    """Wraps another: every second step goes half the way back to slow weights."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.count = optimizer, 0
        super().__init__(optimizer.param_groups, {})
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = self.optimizer.step(closure)  # type: ignore[arg-type]
        self.count += 1
        if self.count % 2 == 0:
            fast = [p for group in self.param_groups for p in group["params"]]
            for slow, parameter in zip(self.slow, fast, strict=True):
                slow.add_(parameter.data - slow, alpha=0.5)
                parameter.data.copy_(slow)
        return loss


class Sam(Optimizer):
    """The sharpness-aware optimizer that repositories copy: up the slope, then a step of the gradient there."""

    def __init__(self, parameters: Any, rho: float = 0.05) -> None:
        super().__init__(parameters, {"rho": rho})
        self.inner = torch.optim.SGD(self.param_groups, 0.1, momentum=0.9)
        self.param_groups = self.inner.param_groups

    def length(self) -> Tensor:
        gradients = [p.grad.norm(p=2) for group in self.param_groups for p in group["params"] if p.grad is not None]
        return torch.norm(torch.stack(gradients), p=2)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        assert closure is not None
        again = torch.enable_grad()(closure)
        loss = again()
        scale = 0.05 / (self.length() + 1e-12)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["old"] = parameter.data.clone()
                parameter.add_(parameter.grad * scale)
        again()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data = self.state[parameter]["old"]
        self.inner.step()
        return loss


class SamByHand(Manual):
    """The same under manual optimisation, with weights assigned to ``p.data``."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        held = [p for p in self.parameters() if p.grad is not None]
        length = torch.stack([p.grad.norm() for p in held]).norm()  # type: ignore[union-attr]
        old = [p.data for p in held]
        for parameter in held:
            parameter.data = parameter.data + 0.05 * parameter.grad / length
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for parameter, before in zip(held, old, strict=True):
            parameter.data = before
        optimizer.step()
        return loss.detach()


def with_optimizer(make: Callable[[nn.Module], Any], network: Callable[[], nn.Module] = Net) -> Any:
    """Makes the classifier with another optimizer."""

    class Optimised(Classifier):
        def build(self) -> nn.Module:
            return network()

        def configure_optimizers(self) -> Any:
            return make(self)

    return Optimised


class Several(Manual):
    """An optimizer and a scheduler of its own for the body and for the head."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        body, head = self.optimizers()  # type: ignore[misc]
        loss = self.loss(batch)
        body.zero_grad()
        head.zero_grad()
        self.manual_backward(loss)
        torch.nn.utils.clip_grad_norm_(self.net.blocks.parameters(), 0.1)
        body.step()
        if batch_idx % 2:
            head.step()
        for schedule in self.lr_schedulers():  # type: ignore[union-attr]
            schedule.step()
        return loss.detach()

    def configure_optimizers(self) -> Any:
        body = torch.optim.AdamW([*self.net.stem.parameters(), *self.net.blocks.parameters()], 1e-2)
        head = torch.optim.SGD(self.net.head.parameters(), 0.1)
        return [body, head], [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (body, head)]


def groups(module: nn.Module) -> Any:
    """Layer-wise rates and no decay of vectors."""
    parts = [{"params": [p], "lr": 0.1 * 0.9**i, "weight_decay": 0.1 * (p.ndim > 1)} for i, p in _ordered(module)]
    return torch.optim.AdamW(parts)


def _ordered(module: nn.Module) -> list[tuple[int, nn.Parameter]]:
    return list(enumerate(reversed(list(module.parameters()))))


def matrices(module: nn.Module) -> list[nn.Parameter]:
    """Muon takes these only."""
    return [p for p in module.parameters() if p.ndim == 2]


class Microbatches(Manual):
    """Accumulates by hand, then clips as torch does it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        total = torch.zeros(())
        for x, y in zip(batch[0].chunk(2), batch[1].chunk(2), strict=True):
            loss = F.cross_entropy(self(x), y) / 2
            self.manual_backward(loss)
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        return total


CASES = [
    Case("sign_sgd", with_optimizer(lambda m: Sign(m.parameters()))),
    Case("lars", with_optimizer(lambda m: Lars(m.parameters()))),
    Case("lamb", with_optimizer(lambda m: Lamb(m.parameters()))),
    Case("clipped_by_parameter", with_optimizer(lambda m: ClippedByParameter(m.parameters()))),
    Case("adaptive_gradient_clipping", with_optimizer(lambda m: UnitwiseClipped(m.parameters()))),
    Case("gradient_centralisation", with_optimizer(lambda m: Centralised(m.parameters()), Transformer)),
    Case("normalised_sgd", with_optimizer(lambda m: Normalised(m.parameters()))),
    Case("lookahead", with_optimizer(lambda m: Lookahead(torch.optim.Adam(m.parameters(), 1e-2)))),
    Case("sam_optimizer", with_optimizer(lambda m: Sam(m.parameters()))),
    Case("sam_by_hand", SamByHand),
    # it rounds gradients to bfloat16, where the last bit of a float32 may tip
    Case("muon", with_optimizer(lambda m: torch.optim.Muon(matrices(m), 0.05), Transformer)),
    Case("adafactor", with_optimizer(lambda m: torch.optim.Adafactor(m.parameters(), 0.05))),
    Case(
        "lbfgs",
        with_optimizer(lambda m: torch.optim.LBFGS(m.parameters(), 0.1, max_iter=3)),
        refused=dict.fromkeys(("t", "st"), "LBFGS"),
        note="it joins all parameters to one vector",
    ),
    Case("rprop", with_optimizer(lambda m: torch.optim.Rprop(m.parameters(), 1e-3))),
    Case("asgd", with_optimizer(lambda m: torch.optim.ASGD(m.parameters(), 0.1, t0=1))),
    Case("nadam_amsgrad", with_optimizer(lambda m: torch.optim.Adam(m.parameters(), 1e-2, amsgrad=True))),
    Case("several_optimizers", Several),
    Case("parameter_groups", with_optimizer(groups, Transformer)),
    Case("accumulated_by_hand", Microbatches, trainer={"max_epochs": 2}),
]
