"""Hooks of the module and of callbacks that read or write parameters and gradients."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.nn import functional as F

from tests.user_code.case import SPLIT, Case, evaluated
from tests.user_code.networks import Classifier, TransformerClassifier


class ScaledGradients(Classifier):
    """on_after_backward: the first block learns slower."""

    def on_after_backward(self) -> None:
        for parameter in self.net.blocks[0].parameters():
            parameter.grad.mul_(0.5)


class AccumulatedSeen(Classifier):
    """on_after_backward of every micro-step looks at what there is."""

    seen: list[float]

    def on_after_backward(self) -> None:
        self.__dict__.setdefault("seen", [])
        self.seen.append(sum(p.grad.pow(2).sum().item() for p in self.parameters()) ** 0.5)


class NoisyGradients(Classifier):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        generator = torch.Generator().manual_seed(self.global_step)
        for parameter in self.parameters():
            parameter.grad += 0.01 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


class CentredGradients(TransformerClassifier):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            if parameter.ndim > 1:
                parameter.grad = parameter.grad - parameter.grad.mean(dim=1, keepdim=True)


class GradientNorms(Classifier):
    """Logs Lightning's grad_norm."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log_dict(grad_norm(self, norm_type=2))


class GradientsAfterStep(Classifier):
    """Looks at gradients when the optimizer has stepped."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        norms = [p.grad.norm() for p in self.parameters() if p.grad is not None]
        self.seen.append(float(torch.stack(norms).norm()))


class BeforeZeroGrad(Classifier):
    """on_before_zero_grad: a weight's largest number, and whether a gradient is there."""

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.log("largest", max(p.abs().max().item() for p in self.parameters()))


class SkippedSteps(Classifier):
    """optimizer_step: warm-up of the rate, and no step where the gradient is long."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(1.0, (self.global_step + 1) / 3)

        def closure() -> Any:
            loss = optimizer_closure()
            total = torch.stack([p.grad.norm() for p in self.parameters()]).norm()
            if total.item() > 1.7:
                for parameter in self.parameters():
                    parameter.grad = None
            return loss

        optimizer.step(closure=closure)


class WeightNorms(TransformerClassifier):
    """Logs norms and means of weights wherever there is a hook."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.log("start", self.layer().weight.norm())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("inside", self.layer().weight.norm())
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        self.log("end", self.layer().weight.std())

    def on_validation_epoch_end(self) -> None:
        self.log("validated", self.layer().weight.abs().mean())

    def on_train_epoch_end(self) -> None:
        self.log("epoch", sum(p.sum() for p in self.parameters()))

    def layer(self) -> Any:
        return self.net.layers[0].attention.qkv


class WeightsWatched(Callback):
    """Reads numbers of weights in the hooks of a callback."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(float(sum(p.numel() for p in pl_module.parameters())))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        weight = pl_module.net.blocks[0].mlp.fc1.weight
        self.seen += [float(weight.norm()), weight.min().item(), float((weight > 0).sum()), float(weight[3, 2])]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        flat = nn.utils.parameters_to_vector(pl_module.parameters())
        self.seen += [float(len(flat)), flat.std().item()]


class InitialisedLate(Classifier):
    """on_fit_start: nn.init, after the network was built."""

    def on_fit_start(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter, gain=2.0)
            elif "bias" in name:
                nn.init.normal_(parameter, std=0.1)


class FirstBatchInitialised(Classifier):
    """Scales a layer by what it gives for the first batch, as ActNorm and LSUV do; the same on every rank."""

    def on_train_start(self) -> None:
        x = torch.linspace(-1, 1, 64, dtype=self.net.stem.weight.dtype).reshape(8, 8)
        with torch.no_grad():
            self.net.stem.weight.div_(self.net.stem(x).std())
            self.net.head.weight /= self(x).std()


class Reset(Classifier):
    """Starts the head anew in every epoch, by the layer's own method."""

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(self.current_epoch)
        self.net.head.reset_parameters()


class OwnSchedulerStep(Classifier):
    """lr_scheduler_step, with a schedule that wants the metric."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.3)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(metric)
        self.seen = [*getattr(self, "seen", []), scheduler.get_last_lr()[0]]


class OwnClipping(Classifier):
    """configure_gradient_clipping: each block by itself, with torch's function."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        for block in self.net.blocks:
            norm = torch.nn.utils.clip_grad_norm_(block.parameters(), 0.05)
        self.log("norm", norm)


class SavedNorms(Classifier):
    """on_save_checkpoint: adds a number of the weights to the file, and reads it there."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["length"] = sum(p.norm().item() for p in self.parameters())
        self.seen = [checkpoint["length"]]

    def on_train_end(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.trainer.save_checkpoint(f"{self.trainer.strategy.broadcast(folder)}/last.ckpt")
            self.trainer.strategy.barrier()


class HookedParameters(Classifier):
    """Tensor hooks on parameters change their gradients."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.net.blocks[0].parameters():
            parameter.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))


class ActivationStatistics(Classifier):
    """Forward hooks on inner layers, whose numbers are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.means: dict[str, Tensor] = {}
        for i, block in enumerate(self.net.blocks):
            block.mlp.fc1.register_forward_hook(lambda _, __, y, i=i: self.means.update({f"mean_{i}": y.mean()}))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log_dict({name: value.detach() for name, value in self.means.items()})
        return loss


class ExtractedFeatures(Classifier):
    """What a hook caught in a block is part of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net.blocks[1].mlp.fc1.register_forward_hook(lambda _, __, y: setattr(self, "features", y))

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + 0.1 * self.features.pow(2).sum(1).mean()


class HiddenSupervised(Classifier):
    """A second head reads a block's hidden layer, caught by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(16, 4)
        self.net.blocks[0].mlp.fc1.register_forward_hook(lambda _, __, y: setattr(self, "features", y))

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + F.cross_entropy(self.second(self.features.relu()), batch[1])


class BackwardHooks(Classifier):
    """Full backward hooks look at gradients inside, and change one."""

    def __init__(self) -> None:
        super().__init__()
        self.net.blocks[0].register_full_backward_hook(lambda _, gradients, __: (gradients[0] * 0.5,))


CASES = [
    Case("gradients_scaled", ScaledGradients),
    Case("gradients_seen_accumulating", AccumulatedSeen, trainer={"accumulate_grad_batches": 2}),
    Case("gradient_noise", NoisyGradients),
    Case("gradients_centred", CentredGradients),
    Case("gradient_norms_logged", GradientNorms),
    Case("gradients_after_step", GradientsAfterStep),
    Case("before_zero_grad", BeforeZeroGrad),
    Case("optimizer_step_skips", SkippedSteps),
    Case("weight_norms_logged", WeightNorms, val=evaluated),
    Case("weights_read_by_callback", Classifier, callbacks=lambda: [WeightsWatched()]),
    Case("initialised_in_on_fit_start", InitialisedLate),
    Case("scaled_by_first_outputs", FirstBatchInitialised),
    Case("head_reset", Reset, trainer={"max_epochs": 2}),
    Case("lr_scheduler_step", OwnSchedulerStep, val=evaluated, trainer={"max_epochs": 3}),
    Case("own_gradient_clipping", OwnClipping, trainer={"gradient_clip_val": 1.0}),
    Case("norms_in_checkpoint", SavedNorms),
    Case(
        "parameter_hooks",
        HookedParameters,
        like="ddp",
        refused=dict.fromkeys(SPLIT, "hooks on its gradient"),
        note="as ddp: a hook sees the rank's own gradient",
    ),
    Case("activation_statistics", ActivationStatistics),
    Case("features_in_loss", ExtractedFeatures),
    Case("hidden_layer_supervised", HiddenSupervised),
    Case("backward_hooks", BackwardHooks),
]
