"""What the user's code sees of parameters, gradients and optimizers between steps; see [Note: what a stage holds]."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lightning_dist.compat.torch import version_of
from lightning_dist.logs.code_scan import GRADIENTS, scan_hook
from lightning_dist.parallel.pipeline.stage_owner import (
    StageOwner,
    forget_stages,
    plain_parameters,
    show_states,
    staged,
)
from lightning_dist.parallel.pipeline.staged_tensors import refuse_calls_outside
from lightning_dist.parallel.pipeline.stages import Pipeline
from lightning_dist.patches import Patches
from lightning_dist.placeholder import PIPELINE_SHARE, is_placeholder, placeholder


class ParameterView:
    """Shows the user's code the parameters of all stages; a rank that ``divides`` may have parts only of its own."""

    def __init__(self, module: pl.LightningModule, pipeline: Pipeline, divides: bool, patches: Patches) -> None:
        self._module, self._divides, self._patches = module, divides, patches
        self._stages, self._group, self._device = pipeline.stages, pipeline.group, pipeline.device
        self._hidden: list[tuple[Any, Any]] = []
        """Gradients of other stages, while an optimizer steps."""
        self._own: list[tuple[str, nn.Parameter]] = []
        """Parameters of this rank's stages, as the user's code sees them."""
        patches.also(partial(forget_stages, module))
        for name, parameter in module.named_parameters():
            if not is_placeholder(parameter):
                setattr(parameter, PIPELINE_SHARE, pipeline.stages.num_ranks / len(pipeline.stages.holders(name)))

    def show(self) -> None:
        """Called when parameters are in place. Communication: none."""
        if self._divides:
            refuse_calls_outside(self._module, self._patches)
        self._own = [(n, p) for n, p in self._module.named_parameters() if not is_placeholder(p)]
        for name, parameter in self._module.named_parameters():
            staged(parameter, StageOwner(name, self._stages.holders(name)[0], self._group, self._divides))

    def versions(self) -> list[tuple[str, int]]:
        """How often each of this rank's parameters was written to, by name."""
        return [(name, version_of(parameter)) for name, parameter in self._own]

    @contextmanager
    def stepping(self, optimizer: Any) -> Iterator[None]:
        """While an optimizer steps, parameters are what they are without stages."""
        show_states(optimizer, self._patches)
        with plain_parameters(self._module.parameters()):
            yield
        if not self.is_scaled:  # hooks after the step find them as in one process
            for parameter, gradient in self._hidden:
                parameter.grad = gradient
        self._hidden = []

    @property
    def is_scaled(self) -> bool:
        """Whether a scaler goes through gradients between a backward and the hooks before the optimizer's step."""
        return getattr(self._module.trainer.precision_plugin, "scaler", None) is not None

    def hide_gradients(self) -> None:
        """Takes gradients of other stages away, before an optimizer steps."""
        self._hidden = [(p, p.grad) for p in self._module.parameters() if is_placeholder(p) and p.grad is not None]
        for parameter, _ in self._hidden:
            parameter.grad = None

    def show_gradients(self) -> None:
        """Where hooks look at gradients, those of other stages are there, without memory: to be sent, or to be refused.

        Communication over the axis: one all-reduce of a byte per parameter, where such a hook is.
        """
        if not self._sees_gradients:
            return
        parameters = [p for p in self._module.parameters() if p.requires_grad]
        has = [not is_placeholder(p) and p.grad is not None for p in parameters]
        flags = torch.tensor(has, dtype=torch.uint8, device=self._device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        for parameter, flag in zip(parameters, flags.tolist(), strict=True):
            if is_placeholder(parameter):
                parameter.grad = placeholder(parameter) if flag else None

    @cached_property
    def is_undisturbed(self) -> bool:
        """Whether code of Lightning's alone runs from the end of a training step to the end of its backward: nobody
        scales the loss, or looks at gradients or zeroes them in a way of their own.
        """
        trainer, module = self._module.trainer, self._module
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        plugin = trainer.precision_plugin
        scales: Any = getattr(plugin, "scaler", None)
        scaler: Any = GradScaler if scales is None else type(scales)
        return (
            module.automatic_optimization
            and not any(is_overridden(hook, module) for hook in _BACKWARD_HOOKS)
            and not any(is_overridden(hook, one, Callback) for hook in _CALLBACK_HOOKS for one in callbacks)
            and all(getattr(type(plugin), m).__module__.startswith("lightning.") for m in ("pre_backward", "backward"))
            and type(trainer.strategy).backward.__module__.startswith("lightning_dist.")
            and all(getattr(scaler, m) is getattr(GradScaler, m) for m in ("scale", "get_scale"))
            and all(type(optimizer).zero_grad is Optimizer.zero_grad for optimizer in trainer.optimizers)
        )

    def zeroed(self) -> set[nn.Parameter] | None:
        """What Lightning is about to zero, before the backward of the step that begins; None where the user may see."""
        if not self.is_undisturbed:
            return None
        trainer = self._module.trainer
        if trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches:
            return set()
        return {p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}

    @cached_property
    def _sees_gradients(self) -> bool:
        """Whether code of the user's looks at gradients between a backward and the next one's zeros."""
        callbacks: list[Any] = self._module.trainer.callbacks  # type: ignore[attr-defined]
        own = [callback for callback in callbacks if not type(callback).__module__.startswith("lightning.")]
        return (
            not self._module.automatic_optimization
            or any(is_overridden(hook, self._module) for hook in _GRADIENT_HOOKS)
            or any(is_overridden(hook, callback, Callback) for hook in _GRADIENT_HOOKS[:2] for callback in own)
            or any(GRADIENTS in scan_hook(owner, hook) for owner in (self._module, *own) for hook in _LATER_HOOKS)
        )


_GRADIENT_HOOKS = ("on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step")
_CALLBACK_HOOKS = ("on_before_backward", "on_before_zero_grad")
_BACKWARD_HOOKS = (*_CALLBACK_HOOKS, "backward", "optimizer_zero_grad")
_LATER_HOOKS = ("on_train_batch_end", "on_before_zero_grad")
"""In which gradients are still there, and few look."""
