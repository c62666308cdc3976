"""``requires_grad`` that changes while a run goes on trains what one process trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dist.checkpoint import full
from lightning_dist.parallel import ddp
from tests.support import models
from tests.support.collectives import counting
from tests.support.models import BLOCK_PLAN, WIDTH, Block, samples
from tests.support.parity import DATA_AND_TENSOR, QUIET, Run, assert_equal, in_turn, once, train
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled


class PerParameter(Callback):
    """Notes the norm of each parameter's gradient before each step of an optimizer; -1 for none."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            norm = -1.0 if parameter.grad is None else float(full(parameter.grad).double().norm())
            pl_module.seen.append((name, parameter.requires_grad, norm))


class Watched(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool, float]] = []

    def configure_callbacks(self) -> Any:
        return [PerParameter()]


def discriminating() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(), Block(), nn.Linear(WIDTH, 1))


class Adversaries(Watched):
    """Two networks with repeated blocks, trained in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(), Block(), nn.Linear(WIDTH, WIDTH))
        self.critic = discriminating()

    def of_generator(self, x: Tensor) -> Tensor:
        return F.softplus(-self.critic(self.generator(x.flip(1)))).mean()

    def of_critic(self, x: Tensor) -> Tensor:
        fake = self.generator(x.flip(1)).detach()
        return F.softplus(-self.critic(x)).mean() + F.softplus(self.critic(fake)).mean()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.generator.parameters(), 0.05, momentum=0.9),
            torch.optim.SGD(self.critic.parameters(), 0.05, momentum=0.9),
        ]


class Toggled(Adversaries):
    """As Lightning's tutorial has it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        generator, critic = self.optimizers()  # type: ignore[misc]
        self.toggle_optimizer(generator)
        loss = self.of_generator(x)
        self.manual_backward(loss)
        generator.step()
        generator.zero_grad()
        self.untoggle_optimizer(generator)
        with self.toggled_optimizer(critic):
            critic_loss = self.of_critic(x)
            self.manual_backward(critic_loss)
            critic.step()
            critic.zero_grad()
        return (loss + critic_loss).detach()


class ToggledModels(Adversaries):
    """By the optimizers' own context, with gradients that add up over two steps."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        losses = []
        for optimizer, loss_of in zip(self.optimizers(), (self.of_generator, self.of_critic), strict=True):  # type: ignore[arg-type]
            steps = batch_idx % 2 == 1
            with optimizer.toggle_model(sync_grad=steps):
                losses.append(loss_of(x) / 2)
                self.manual_backward(losses[-1])
                if steps:
                    optimizer.step()
                    optimizer.zero_grad()
        return sum(losses).detach()  # type: ignore[union-attr]


def set_requires_grad(networks: Iterable[nn.Module], requires_grad: bool) -> None:
    """As CycleGAN has it."""
    for network in networks:
        for parameter in network.parameters():
            parameter.requires_grad = requires_grad


class Cycle(Adversaries):
    """The critic is frozen while the generator trains, and the generator trains with what the critic thinks."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        generator, critic = self.optimizers()  # type: ignore[misc]
        set_requires_grad([self.critic], False)
        generator.zero_grad()
        loss = self.of_generator(x)
        self.manual_backward(loss)
        generator.step()
        set_requires_grad([self.critic], True)
        critic.zero_grad()
        critic_loss = self.of_critic(x)
        self.manual_backward(critic_loss)
        critic.step()
        return (loss + critic_loss).detach()


class CycleForwardFirst(Adversaries):
    """As in the original: one forward of everything, then flags, then backward passes through the critic again."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        generator, critic = self.optimizers()  # type: ignore[misc]
        fake = self.generator(x.flip(1))
        set_requires_grad([self.critic], False)
        generator.zero_grad()
        loss = F.softplus(-self.critic(fake)).mean()
        self.manual_backward(loss)
        generator.step()
        set_requires_grad([self.critic], True)
        set_requires_grad([self.generator], False)
        critic.zero_grad()
        critic_loss = F.softplus(self.critic(fake.detach())).mean() + F.softplus(-self.critic(x)).mean()
        self.manual_backward(critic_loss)
        critic.step()
        set_requires_grad([self.generator], True)
        return (loss + critic_loss).detach()


class Stack(Watched):
    """Automatic optimisation of a stem, blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.net = models.Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class InTheStep(Stack):
    """Which of its parts trains changes with the step, before the forward."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = [self.net.stem, *self.net.blocks, self.net.head]
        for index, part in enumerate(parts):
            set_requires_grad([part], (index + batch_idx) % 3 != 0)
        return super().training_step(batch, batch_idx)


class BetweenForwardAndBackward(Stack):
    """Frozen once the forward ran, and thawed before the next."""

    def on_before_backward(self, loss: Tensor) -> None:
        set_requires_grad([self.net.blocks[1], self.net.head], False)

    def on_train_batch_end(self, *args: Any) -> None:
        set_requires_grad([self.net.blocks[1], self.net.head], True)


class InTheStepAfterForward(Stack):
    """Frozen in the step itself, once the forward ran, and thawed before the next."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        set_requires_grad([self.net], True)
        loss = super().training_step(batch, batch_idx)
        set_requires_grad([self.net.blocks[batch_idx % 3], self.net.stem], False)
        return loss


class FirstFrozenOnly(Stack):
    """Frozen at the start, and thawed in the middle of an epoch."""

    def __init__(self) -> None:
        super().__init__()
        set_requires_grad([self.net.stem, self.net.blocks[0]], False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        set_requires_grad([self.net.stem, self.net.blocks[0]], batch_idx > 2)


class EpochByEpoch(Stack):
    """Another part is frozen in each epoch."""

    def on_train_epoch_start(self) -> None:
        set_requires_grad([self.net], True)
        set_requires_grad([self.net.blocks[self.current_epoch], self.net.norm], False)


class Pretrained(Stack):
    """Named as Lightning's callback wants it; trains the head at first."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(self.net.stem, *self.net.blocks)
        self.head = self.net.head
        del self.net

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05, momentum=0.9)


class BlockByBlock(BaseFinetuning):
    """Thaws a block with each epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        self.unfreeze_and_add_param_group(pl_module.backbone[-1 - epoch], optimizer, lr=0.02)


def backbone_finetuning() -> list[Callback]:
    return [BackboneFinetuning(1, verbose=False)]


def block_by_block() -> list[Callback]:
    return [BlockByBlock()]


CASES: dict[str, Run] = {
    "toggled": Run(Toggled, samples),
    "toggled-models-accumulating": Run(ToggledModels, samples),
    "cycle": Run(Cycle, samples),
    "cycle-forward-first": Run(CycleForwardFirst, samples),
    "in-the-step": Run(InTheStep, samples),
    "in-the-step-accumulating": Run(InTheStep, samples, trainer={"accumulate_grad_batches": 2}),
    "between-forward-and-backward": Run(BetweenForwardAndBackward, samples),
    "between-forward-and-backward-accumulating": Run(
        BetweenForwardAndBackward, samples, trainer={"accumulate_grad_batches": 2}
    ),
    "in-the-step-after-forward": Run(InTheStepAfterForward, samples, trainer={"accumulate_grad_batches": 2}),
    "thawed-in-an-epoch": Run(FirstFrozenOnly, samples),
    "epoch-by-epoch": Run(EpochByEpoch, samples, trainer={"max_epochs": 3}),
    "backbone-finetuning": Run(Pretrained, samples, trainer={"max_epochs": 3}, callbacks=backbone_finetuning),
    "base-finetuning": Run(Pretrained, samples, trainer={"max_epochs": 3}, callbacks=block_by_block),
}


def train_noting_flags(run: Run, layout: str | None) -> Any:
    """The record of a training, what each parameter's gradients were, and the flags that were left."""
    kept: list[Any] = []

    def build() -> Any:
        kept.append(run.module())
        return kept[0]

    strategy = {"tensor_plan": BLOCK_PLAN} if layout is not None and "tp" in layout else {}
    record = train(Run(**{**vars(run), "module": build, "strategy": strategy}), layout)
    return record, kept[0].seen, {name: p.requires_grad for name, p in kept[0].named_parameters()}


@pytest.mark.parametrize(("layout", "num_ranks", "case"), in_turn(DATA_AND_TENSOR, CASES))
def test_flags_that_change_train_what_one_process_trains(case: str, layout: str, num_ranks: int) -> None:
    one, seen, flags = once(train_noting_flags, CASES[case], None)
    assert one.losses
    assert seen
    for record, seen_there, flags_there in run_on_ranks(num_ranks, train_noting_flags, CASES[case], layout):
        assert_equal(one, record)
        assert flags_there == flags
        assert [s[:2] for s in seen_there] == [s[:2] for s in seen]
        torch.testing.assert_close([s[2] for s in seen_there], [s[2] for s in seen], rtol=1e-4, atol=1e-6)


class Resting(Stack):
    """Leaves two parts frozen for several steps, and notes how many parameters the reducer waits for."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        set_requires_grad([self.net.stem, self.net.blocks[2]], not 1 <= batch_idx <= 5)

    def on_train_batch_end(self, *args: Any) -> None:
        parts: Any = getattr(self.trainer.strategy, "parts", None)
        parallel = parts and parts.module_setup.runner
        self.seen.append(("", False, float(len(getattr(parallel, "_trained", [])))))


def _rest(run: Run) -> Any:
    before, ddp.PATIENCE = ddp.PATIENCE, 3
    try:
        return train_noting_flags(run, "dp_replicate=2")
    finally:
        ddp.PATIENCE = before


def test_zeros_of_what_stays_frozen_are_not_sent_for_long() -> None:
    run = Run(Resting, samples)
    one, *_ = train_noting_flags(run, None)
    num_all = len(list(Stack().parameters()))
    for record, seen, _ in run_on_ranks(2, _rest, run):
        assert_equal(one, record)
        counts = [count for name, _, count in seen if not name]
        assert counts == [num_all] * 4 + [num_all - 8] * 2 + [num_all] * 2


def _reductions(layout: str) -> list[dict[str, int]]:
    counts: list[dict[str, int]] = []
    runner = L.Trainer(**QUIET, devices=2, strategy=counting("backward", counts)(layout), max_epochs=1)
    runner.fit(Toggled(), DataLoader(samples(), batch_size=8))
    return counts


def test_a_frozen_network_costs_no_collective() -> None:
    for counts in run_on_ranks(2, _reductions, "dp_replicate=2"):
        assert len(counts) == 8
        assert counts[4:] == [{"all-reduce": 1}] * 4
