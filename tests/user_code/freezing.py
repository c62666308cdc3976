"""What trains changes while it trains."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import BaseFinetuning, LambdaCallback
from torch import Tensor, nn

from tests.user_code.case import Case
from tests.user_code.networks import Classifier, Transformer


class FrozenInStep(Classifier):
    """From the third step on the first block stays as it is; the optimizer holds it still."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 2:
            self.net.blocks[0].requires_grad_(False)
            for parameter in self.net.blocks[0].parameters():
                parameter.grad = None
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class AlternatingParts(Classifier):
    """Odd steps train the head, even ones the rest."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for name, parameter in self.named_parameters():
            parameter.requires_grad = ("head" in name) == bool(batch_idx % 2)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class ThawedByEpoch(Classifier):
    """One block more in every epoch."""

    def on_train_epoch_start(self) -> None:
        for i, block in enumerate(self.net.blocks):
            block.requires_grad_(i <= self.current_epoch - 1)


class Frozen(Classifier):
    """Part of the network is frozen from the beginning, in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net.stem.requires_grad_(False)
        self.net.blocks[0].requires_grad_(False).eval()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(filter(lambda p: p.requires_grad, self.parameters()), 1e-2)


class Finetuned(Classifier):
    """Has a backbone, which the callback thaws."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Transformer(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.backbone(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


class Thawing(BaseFinetuning):
    """Lightning's own example."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, train_bn=True)


def frozen_by_callback(trainer: Any, module: Any, *args: Any) -> None:
    """Freezes biases when the training starts."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad = "bias" not in name


class LowRank(nn.Module):
    """LoRA: a frozen layer and a small product beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down, self.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


class Adapted(Classifier):
    """LoRA in attention, all else frozen."""

    def build(self) -> nn.Module:
        network = Transformer().requires_grad_(False)
        for layer in network.layers:
            layer.attention.proj = LowRank(layer.attention.proj)
        return network

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)


CASES = [
    Case("frozen_in_step", FrozenInStep),
    Case("alternating_parts", AlternatingParts),
    Case("thawed_by_epoch", ThawedByEpoch, trainer={"max_epochs": 3}),
    Case("frozen_from_the_start", Frozen),
    Case("base_finetuning", Finetuned, callbacks=lambda: [Thawing()], trainer={"max_epochs": 2}),
    Case("frozen_by_callback", Classifier, callbacks=lambda: [LambdaCallback(on_train_start=frozen_by_callback)]),
    Case("low_rank_adapters", Adapted),
]
