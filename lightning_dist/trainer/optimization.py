"""The optimisation of a fit: gradients are finished before anything looks at them, and clipped over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from lightning_dist import gradients, optimizers
from lightning_dist.compat import lightning as private
from lightning_dist.module_layout import make_parameters_equal
from lightning_dist.parallel import DDPRunner
from lightning_dist.patches import Patches
from lightning_dist.precision import make_agreeing
from lightning_dist.ranks import LayoutRanks
from lightning_dist.trainer.module_setup import ModuleSetup
from lightning_dist.trainer.numbers import Numbers
from lightning_dist.validation import validate_gradient_hooks, validate_lbfgs


class Optimization:
    """Stands between Lightning's optimisation of a fit and the gradients of the layout.

    ``weight_of_batch`` gives what the loss of the batch that runs counts beside others; but for the end of an epoch in
    a run that goes on with other ranks, 1.
    """

    def __init__(
        self, ranks: LayoutRanks, setup: ModuleSetup, numbers: Numbers, weight_of_batch: Callable[[], float]
    ) -> None:
        self._ranks, self._setup, self._numbers = ranks, setup, numbers
        self._weight_of_batch = weight_of_batch
        self.gradient_norm: Tensor | None = None
        """Norm of the gradients before the last clipping by norm; the same on every rank."""
        self._precision: Any = None
        self._patches = Patches()
        self._has_run_backward, self._epoch_of_copies = False, -1
        """Whether a backward pass of this run was the strategy's; whose first step saw that copies are equal."""

    def attach(self, precision: Precision, patches: Patches) -> None:
        """From here on the precision plugin, through which Lightning clips, works over all ranks."""
        self._precision, self._patches = precision, patches
        self._has_run_backward, self._epoch_of_copies = False, -1
        patches.set(precision, "clip_grad_by_norm", self._clip_by_norm)
        patches.set(precision, "clip_grad_by_value", self._clip_by_value)
        patches.wrap(precision, "post_backward", self._after_backward)
        patches.wrap(precision, private.BEFORE_OPTIMIZER_STEP, self._before_step)
        if self._ranks.world_size > 1:
            make_agreeing(precision, patches)

    def check(self, optimizer: Optimizer) -> None:
        """Makes an optimizer of the fit ready to step over parts.

        Raises a ValueError for one that would not do over parts what it does over whole parameters, or holds those of
        an earlier run. Communication: see :func:`lightning_dist.optimizers.validate_exact`, where the layout divides.
        """
        self._setup.validate_optimizer(optimizer)
        validate_lbfgs(optimizer)
        if self._ranks.holds_shards:
            assert self._ranks.layout is not None
            optimizers.step_over_local_parts(optimizer, self._patches)
            optimizers.validate_exact(optimizer, self._ranks.layout, self._ranks.device)
        # a forward pass without a backward leaves a root gathered: the step must not go on beside the gathered copy
        self._patches.also(optimizer.register_step_pre_hook(lambda *_: self._setup.reshard()).remove)

    def before_training_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps buffers equal on the data ranks and, at an epoch's first step, what hooks drew for parameters."""
        runner, ranks = self._setup.runner, self._ranks
        if ranks.mesh is not None and self._epoch_of_copies != (epoch := runner.module.trainer.current_epoch):
            assert ranks.layout is not None
            self._epoch_of_copies = epoch
            validate_gradient_hooks(runner.module, ranks.layout)
            make_parameters_equal(runner.module, ranks.mesh)
        runner.weight = self._weight_of_batch()
        runner.before_training_step()
        self._numbers.before_step(args, kwargs)

    def accumulating(self) -> AbstractContextManager[None]:
        """Around a step whose gradients are only added up; but where a hook of the user's looks at them, reduced."""
        runner = self._setup.runner
        hook, callbacks = "on_after_backward", runner.module.trainer.callbacks
        watches = is_overridden(hook, runner.module) or any(is_overridden(hook, c, Callback) for c in callbacks)
        return nullcontext() if watches else runner.accumulating()

    def before_backward(self, loss: Tensor, inputs: Any) -> Tensor:
        """The loss to start a backward pass from; raises a ValueError where it is for some inputs alone."""
        if inputs is not None and self._ranks.num_data_ranks > 1:
            raise ValueError(
                f"manual_backward(..., inputs=) under layout {self._ranks.layout}: gradients of some parameters alone "
                "can't be reduced over the data ranks; freeze the others meanwhile (toggle_optimizer, requires_grad_)"
            )
        self._has_run_backward, runner = True, self._setup.runner
        self._numbers.note_loss(loss)
        return runner.before_backward(runner.weighted(loss))

    def _after_backward(self, original: Callable[..., Tensor], *args: Any) -> Tensor:
        """Wraps the plugin's method that calls ``on_after_backward``, which sees finished gradients."""
        self._setup.runner.after_backward()
        self._numbers.after_backward()
        return original(*args)

    @contextmanager
    def step(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
        """While an optimizer steps; gives its closure. For one that reads the loss, an all-reduce of that."""
        if self._ranks.num_data_ranks > 1:
            self._validate_reduced(optimizer)
            if optimizers.reads_the_loss(optimizer):
                closure = partial(self._with_mean_loss, closure)
        with self._setup.runner.stepping(optimizer):
            yield partial(self._hooked, closure)

    def _validate_reduced(self, optimizer: Optimizer) -> None:
        """Raises a RuntimeError for gradients of a backward pass that this strategy was not told of, and for parameters
        that came to the module during the fit, which the data ranks don't share.
        """
        runner, module = self._setup.runner, self._setup.runner.module
        held_by = [p for group in optimizer.param_groups for p in group["params"]]
        told = self._has_run_backward or not isinstance(runner, DDPRunner) or module.automatic_optimization
        if not told and any(p.grad is not None for p in held_by):
            raise RuntimeError(
                "gradients that came by loss.backward() or torch.autograd.backward are those of this rank's samples: "
                "call self.manual_backward(loss), which averages them over the data ranks"
            )
        others = set(map(id, held_by)).difference(self._setup.known_parameters)
        new = [name for name, p in module.named_parameters() if id(p) in others] if others else []
        if new:
            raise RuntimeError(
                f"{new[0]} came to the module after the fit had begun, and the optimizer has it: its gradient is not "
                f"reduced over the data ranks of layout {self._ranks.layout}; build it before the fit (in "
                "configure_model, frozen if need be), or go on from a checkpoint in a new fit"
            )

    def _hooked(self, run: Callable[..., Any], *args: Any) -> Any:
        """What an optimizer's step calls of Lightning's, with the user's hooks in it."""
        with self._setup.runner.hooked():
            return run(*args)

    def _before_step(self, original: Callable[..., None], *args: Any) -> None:
        """Wraps the plugin's method that calls ``on_before_optimizer_step``, after which an optimizer steps."""
        runner = self._setup.runner
        runner.before_step_hooks()
        self._hooked(original, *args)
        runner.hide_gradients()

    def _with_mean_loss(self, closure: Callable[[], Any]) -> Any:
        loss = closure()
        return self._ranks.reduce(loss.detach()) if isinstance(loss, Tensor) else loss

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        self.gradient_norm = gradients.clip_by_norm(self._precision.main_params(optimizer), clip_val)
        self._numbers.note_norm(self.gradient_norm)

    def _clip_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        gradients.clip_by_value(self._precision.main_params(optimizer), clip_val)
