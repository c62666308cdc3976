"""A module that a user hands to Fabric: how it is set up, and what Fabric calls then."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import FrameType, SimpleNamespace
from typing import Any, TypeAlias

import torch
from lightning import Fabric
from lightning.fabric.plugins import Precision
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_dist.collectives import broadcast_tensors
from lightning_dist.data import validate_same_batches
from lightning_dist.logs import attach_metrics
from lightning_dist.module_layout import ModuleOptions, apply_layout, make_parameters_equal
from lightning_dist.parallel import SingleProcessRunner, average_buffers, validate_blocks
from lightning_dist.parallel.placing import to_device
from lightning_dist.parallel.single_process import CALL
from lightning_dist.patches import Patches
from lightning_dist.plans.tensor import parameter_splits
from lightning_dist.precision import shard_policy
from lightning_dist.random_states import share_random_state
from lightning_dist.ranks import LayoutRanks
from lightning_dist.validation import validate_no_lazy, validate_parameter_kinds

TakesPart: TypeAlias = Callable[["InLayout"], None]
"""Called before each forward with gradients; see [Note: which modules take part in a backward pass]."""


class InLayout(nn.Module):
    """Stands around a module as DistributedDataParallel does: what Fabric calls goes through its forward.

    [Note: which modules take part in a backward pass]
    Fabric hands a loss over, and not what it depends on. A module takes part in all backward passes from a forward of
    it with gradients on, as the code of the loop says it, on all ranks alike. It leaves when another forward begins
    after the step of an optimizer that has all that it trains. For one that the loss does not depend on (a generator,
    in the discriminator's step) that changes nothing; where it is replicated, its gradients travel.

    Args:
        module: divided, or replicated.
        parallel: what runs it.
        ranks: of a layout whose mesh is formed.
        takes_part: is told of forwards.

    Communication: what ``parallel`` does. At the first training forward see :func:`make_parameters_equal`, at the first
    in evaluation mode after training :func:`average_buffers`; under ``tp`` one all-reduce of a digest of the first
    batch in training and in evaluation.
    """

    def __init__(
        self, module: nn.Module, parallel: SingleProcessRunner, ranks: LayoutRanks, takes_part: TakesPart
    ) -> None:
        super().__init__()
        self.module, self.parallel = module, parallel
        self.had_backward = self.is_stepped = self.is_unreduced = False
        """Whether a backward pass of Fabric's ran since the last step; whether an optimizer has stepped on all that it
        trains since its last forward; whether gradients were added up that no rank has had from the others."""
        self._parameters_of_module = {id(p): p for p in module.parameters()}  # between passes units may show others
        assert ranks.mesh is not None
        self._mesh, self._device, self._takes_part = ranks.mesh, ranks.device, takes_part
        self._compared: set[str] = set()
        self._has_trained, self._is_new = False, True

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, or a method of it that was marked as one."""
        if torch.is_inference_mode_enabled():
            # what fully_shard gathers into would be inference tensors, which training could not write to later
            with torch.inference_mode(False), torch.no_grad():
                return self.forward(*args, **kwargs)
        self._before_forward((args, kwargs))
        output = self.parallel.run(CALL, *args, **kwargs)
        if not torch.is_grad_enabled():
            self.parallel.reshard()  # no backward pass will
        return output

    def _before_forward(self, batch: Any) -> None:
        trains = self.module.training and torch.is_grad_enabled()
        kind = "forward in training" if trains else "forward in evaluation"
        if kind not in self._compared:
            self._compared.add(kind)
            validate_same_batches(kind, (batch,), self._mesh.root["tp"].get_group(), self._device)
        if torch.is_grad_enabled():
            self._takes_part(self)
        if trains:
            if self._is_new:  # code between the setup and the first step may have drawn random values for parameters
                make_parameters_equal(self.module, self._mesh)
            self._is_new = False
            self.parallel.before_training_step()
            self._has_trained = True
        elif not self.module.training:
            self.settle()

    def is_trained_by(self, optimizer: Optimizer, all_of_it: bool = False) -> bool:
        """Whether an optimizer has a parameter of the module, or all that require gradients."""
        held_by = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = self._parameters_of_module
        if all_of_it:
            return all(key in held_by for key, p in own.items() if p.requires_grad)
        return not held_by.isdisjoint(own)

    def settle(self) -> None:
        """Makes buffers equal on all data ranks before they are used or saved, if training may have written them.

        Raises what is wrong with the steps so far, see :meth:`SingleProcessRunner.validate_steps`.
        """
        self.parallel.validate_steps()
        if self._has_trained and self._mesh.data.size() > 1:
            average_buffers(self.module, self._mesh.data.get_group())
        self._has_trained = False

    def after_backward(self) -> None:
        """Called after each backward pass in which it took part."""
        self.parallel.after_backward()
        self.had_backward = True
        self.is_unreduced = not self.parallel.reduces

    def reduce_held(self) -> None:
        """Reduces what backward passes added up under ``no_backward_sync``, where none followed that reduces.

        Communication: that of a backward pass that reduces.
        """
        if not self.is_unreduced:
            return
        self.is_unreduced = False
        if type(self.parallel) is SingleProcessRunner:
            self.parallel.after_backward()
        else:
            self.parallel.skip_backward(held=True)


def bare(module: nn.Module) -> nn.Module:
    """The user's module of one that was set up."""
    return module.module if isinstance(module, InLayout) else module


def set_up(
    module: nn.Module,
    ranks: LayoutRanks,
    options: ModuleOptions,
    precision: Precision,
    made_before: list[Optimizer],
    patches: Patches,
    takes_part: TakesPart,
) -> nn.Module:
    """Divides, or replicates, a module in place; all ranks call it, and go on with rank 0's values.

    Args:
        module: its buffers on this rank's device, its parameters too or on the host.
        ranks: of the run.
        options: the user's.
        precision: Fabric's.
        made_before: optimizers that were made for it, which get the divided parameters.
        patches: get what is put onto the module; what Fabric set up stays so.
        takes_part: of :class:`InLayout`, which is returned; in one process the module itself is.
    """
    layout, reason = ranks.decide(module)
    if reason:
        rank_zero_info(f"layout {layout}: {reason}")
    blocks = options.blocks(module)
    validate_blocks(module, blocks, options.activation_checkpointing)
    plan = options.tensor.sharding_plan(module, layout.tp, blocks)
    if ranks.mesh is not None:
        validate_no_lazy(module)
        _validate_new(module)
        validate_parameter_kinds(module, layout, parameter_splits(plan.tensor_plan) if plan else ())
        share_random_state(ranks.device)
        if layout.holds_shards:
            broadcast_tensors([tensor.detach() for _, tensor in named_tensors(module)], None, device=ranks.device)
        elif reason:  # parameters waited for it
            to_device(module, ranks.device)
        vars(module)[CALL] = partial(nn.Module.__call__, module)
        if options.compile is None:
            options = replace(options, compile=_users_compile_options())
    policy, owners = shard_policy(precision, ranks.device), [SimpleNamespace(optimizers=made_before)]
    runner, _ = apply_layout(module, ranks, options, blocks, plan, policy, patches, owners, in_lists=True)
    if ranks.mesh is None:
        return module
    attach_metrics(module, ranks.mesh.data.get_group(), patches)
    for parameter in module.parameters():
        vars(parameter)[_MARK] = True
    ranks.part_random_streams()
    return InLayout(module, runner, ranks, takes_part)


def _users_compile_options() -> dict[str, Any] | None:
    """Arguments of ``torch.compile``, where the module that Fabric is setting up was compiled; None else.

    Fabric takes the compiled module's wrapper off before a strategy sees it, keeps these in a local variable, and
    compiles what the strategy made of the module, our own code among it (seen in Lightning 2.6.6). That is left alone,
    see :meth:`InLayout.forward`; a strategy compiles the blocks instead.
    """
    frame = frame_of_setup()
    return None if frame is None else frame.f_locals.get("compile_kwargs")


def frame_of_setup() -> FrameType | None:
    """Of Fabric's own setup of a module that is under way, which calls a strategy as the user's code does."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in (Fabric.setup.__code__, Fabric.setup_module.__code__):
        frame = frame.f_back
    return frame


def _validate_new(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor) or vars(parameter).get(_MARK, False):
            raise ValueError(
                f"{name} of {type(module).__name__} was set up before, in this module or in another that shares it: "
                "set up one module that contains all that share parameters, once"
            )


_MARK = "is_set_up_in_layout"


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers."""
    return [*module.named_parameters(), *module.named_buffers()]
