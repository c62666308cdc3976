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
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_dist import gradients, optimizers
from lightning_dist.compat import lightning as private
from lightning_dist.parallel import DDPRunner, SingleProcessRunner
from lightning_dist.parallel.buffers import make_copies_equal
from lightning_dist.patches import Patches
from lightning_dist.placeholder import held
from lightning_dist.precision import make_agreeing
from lightning_dist.ranks import LayoutRanks
from lightning_dist.trainer.module_setup import ModuleSetup
from lightning_dist.validation import validate_gradient_hooks, validate_lbfgs


class Optimization:
    """Stands between Lightning's optimisation of a fit and the gradients of the layout.

    Args:
        ranks: of the run.
        setup: of the module.
    """

    def __init__(self, ranks: LayoutRanks, setup: ModuleSetup) -> None:
        self._ranks, self._setup = ranks, setup
        self.gradient_norm: Tensor | None = None
        """Norm of the gradients before the last clipping by norm; the same on every rank."""
        self._precision: Any = None
        self._patches = Patches()
        self._has_run_backward = False
        """Whether a backward pass of this run was the strategy's."""
        self._epoch_of_copies = -1
        """Whose first step saw that the data ranks' copies are equal."""

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

    @property
    def _runner(self) -> SingleProcessRunner:
        assert self._setup.runner is not None
        return self._setup.runner

    # ------------------------------------------------------------------ before a step

    def check(self, optimizer: Optimizer) -> None:
        """Makes an optimizer of the fit ready to step over parts.

        Communication: see :func:`lightning_dist.optimizers.validate_exact`, where the layout divides.

        Raises:
            ValueError: it would not do over parts what it does over whole parameters, or holds those of an earlier run.
        """
        self._setup.validate_optimizer(optimizer)
        validate_lbfgs(optimizer)
        optimizers.choose_kernels(optimizer)
        if self._ranks.holds_shards:
            assert self._ranks.layout is not None
            optimizers.validate_exact(optimizer, self._ranks.layout, self._ranks.device)
        # a forward pass without a backward leaves a root gathered: the step must not go on beside the gathered copy
        self._patches.also(optimizer.register_step_pre_hook(lambda *_: self._setup.reshard()).remove)

    def before_training_step(self) -> None:
        """Keeps the data ranks' copies of parameters and buffers equal."""
        self._keep_copies_equal()
        self._runner.before_training_step()

    def _keep_copies_equal(self) -> None:
        """At an epoch's first step, since hooks before it may have drawn random values for parameters."""
        module: Any = self._runner.module
        mesh, layout, epoch = self._ranks.mesh, self._ranks.layout, module.trainer.current_epoch
        if mesh is None or layout is None or epoch == self._epoch_of_copies:
            return
        self._epoch_of_copies = epoch
        validate_gradient_hooks(module, layout)
        parameters = held(module.parameters())
        shards = [p for p in parameters if layout.dp_shard > 1 and isinstance(p, DTensor)]
        if layout.num_data_ranks > 1:
            apart = {id(p) for p in shards}
            make_copies_equal((p for p in parameters if id(p) not in apart), mesh.data.get_group())
        if shards and layout.dp_replicate > 1:
            make_copies_equal(shards, mesh.root["dp_replicate"].get_group())

    # ------------------------------------------------------------------ backward

    def accumulating(self) -> AbstractContextManager[None]:
        """Around a step whose gradients are only added up.

        What looks at gradients after such a step sees those of one process: they are reduced at each, then.
        """
        return nullcontext() if _watches_gradients(self._runner.module) else self._runner.accumulating()

    def before_backward(self, loss: Tensor, inputs: Any) -> Tensor:
        """The loss to start a backward pass from.

        Raises:
            ValueError: gradients of some parameters alone were asked for.
        """
        if inputs is not None and self._ranks.num_data_ranks > 1:
            raise ValueError(
                f"manual_backward(..., inputs=) under layout {self._ranks.layout}: gradients of some parameters alone "
                "can't be reduced over the data ranks; freeze the others meanwhile (toggle_optimizer, requires_grad_)"
            )
        self._has_run_backward = True
        return self._runner.before_backward(loss)

    def _after_backward(self, original: Callable[..., Tensor], *args: Any) -> Tensor:
        """Wraps the plugin's method that calls ``on_after_backward``, which sees finished gradients."""
        self._runner.after_backward()
        return original(*args)

    # ------------------------------------------------------------------ an optimizer's step

    @contextmanager
    def step(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
        """While an optimizer steps; gives the closure that it steps with.

        Communication: one all-reduce of the loss, for an optimizer that looks at it.
        """
        if self._ranks.num_data_ranks > 1 and optimizers.reads_the_loss(optimizer):
            closure = partial(self._with_mean_loss, closure)
        self._validate_reduced(optimizer)
        with self._runner.stepping(optimizer):
            yield partial(self._hooked, closure)

    def _validate_reduced(self, optimizer: Optimizer) -> None:
        """Raises where an optimizer is about to step on what the data ranks don't share.

        Raises:
            RuntimeError: gradients of a backward pass that this strategy was not told of; parameters that came to the
                module during the fit.
        """
        if self._ranks.num_data_ranks == 1:
            return
        module: Any = self._runner.module
        held_by = [p for group in optimizer.param_groups for p in group["params"]]
        manual = isinstance(self._runner, DDPRunner) and not module.automatic_optimization
        if manual and not self._has_run_backward and any(p.grad is not None for p in held_by):
            raise RuntimeError(
                "gradients that came by loss.backward() or torch.autograd.backward are those of this rank's samples: "
                "call self.manual_backward(loss), which averages them over the data ranks"
            )
        others = {id(p) for p in held_by} - self._setup.known_parameters.keys()
        new = [name for name, p in module.named_parameters() if id(p) in others] if others else []
        if new:
            raise RuntimeError(
                f"{new[0]} came to the module after the fit had begun, and the optimizer has it: its gradient is not "
                f"reduced over the data ranks of layout {self._ranks.layout}; build it before the fit (in "
                "configure_model, frozen if need be), or go on from a checkpoint in a new fit"
            )

    def _hooked(self, run: Callable[..., Any], *args: Any) -> Any:
        """What an optimizer's step calls of Lightning's, with the user's hooks in it."""
        with self._runner.hooked():
            return run(*args)

    def _before_step(self, original: Callable[..., None], *args: Any) -> None:
        """Wraps the plugin's method that calls ``on_before_optimizer_step``, after which an optimizer steps."""
        self._runner.before_step_hooks()
        self._hooked(original, *args)
        self._runner.hide_gradients()

    def _with_mean_loss(self, closure: Callable[[], Any]) -> Any:
        loss = closure()
        return self._ranks.reduce(loss.detach()) if isinstance(loss, Tensor) else loss

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        self.gradient_norm = gradients.clip_by_norm(self._precision.main_params(optimizer), clip_val)

    def _clip_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        gradients.clip_by_value(self._precision.main_params(optimizer), clip_val)


def _watches_gradients(module: Any) -> bool:
    """Whether a hook of the user's looks at gradients after each backward pass."""
    hook = "on_after_backward"
    return is_overridden(hook, module) or any(is_overridden(hook, c, Callback) for c in module.trainer.callbacks)
