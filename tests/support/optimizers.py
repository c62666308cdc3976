"""Optimizers as users write them, or bring from elsewhere: none knows of parallelism."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.optim import SGD, AdamW, Optimizer


class Lion(Optimizer):
    """Element by element."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    p.sub_((0.9 * mean + 0.1 * p.grad).sign() * group["lr"])
                    mean.mul_(0.99).add_(p.grad, alpha=0.01)
        return loss


class Lars(Optimizer):
    """Each parameter's step is as long as its norm says."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    trust = float(p.norm()) / (float(p.grad.norm()) + 1e-8)
                    p.add_(p.grad, alpha=-group["lr"] * (trust or 1.0))
        return loss


class Sam(Optimizer):
    """Sharpness-aware: climbs by the norm over all parameters, asks again, and steps from where it was."""

    def __init__(self, params: Any, base: type[Optimizer] = SGD, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is not None
        closure = torch.enable_grad()(closure)
        loss = closure()
        held = [(p, g["rho"]) for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p, _ in held]).norm()
        for p, rho in held:
            self.state[p]["climb"] = p.grad * (rho / (norm + 1e-12))
            p.add_(self.state[p]["climb"])
        closure()
        for p, _ in held:
            p.sub_(self.state[p]["climb"])
        self.base_optimizer.step()
        return loss


class Lookahead(Optimizer):
    """Slow weights in a list of its own, beside another optimizer's; not all of Optimizer's own is set."""

    def __init__(self, base: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        self.base, self.k, self.alpha = base, k, alpha
        self.param_groups, self.defaults, self.state = base.param_groups, base.defaults, defaultdict(dict)
        self.count = 0
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]
        super().__init__([{"params": [torch.nn.Parameter(torch.zeros(1))]}], {"lr": 0.0})
        self.param_groups = base.param_groups

    def step(self, closure: Any = None) -> Any:
        loss = self.base.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            with torch.no_grad():
                for group, slow in zip(self.param_groups, self.slow, strict=True):
                    for p, weight in zip(group["params"], slow, strict=True):
                        weight.add_(p - weight, alpha=self.alpha)
                        p.copy_(weight)
        return loss


class WholeClip(SGD):
    """Clips by the norm over a list of its own."""

    def __init__(self, params: Any, lr: float) -> None:
        self.everything = list(params)
        super().__init__(self.everything, lr)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        norm = sum(float(p.grad.norm()) ** 2 for p in self.everything if p.grad is not None) ** 0.5
        for p in self.everything:
            if p.grad is not None:
                p.grad.mul_(min(1.0, 1.0 / (norm + 1e-6)))
        super().step()
        return loss


class Noisy(SGD):
    """Langevin dynamics: draws as many numbers as a parameter has elements."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.randn_like(p), alpha=0.01)
        return loss


def lookahead(params: Any, lr: float) -> Optimizer:
    return Lookahead(AdamW(params, lr))


def sam(params: Any, lr: float) -> Optimizer:
    return Sam(params, lr=lr)
