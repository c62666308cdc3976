"""A module that Fabric calls, under a layout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
from lightning import Fabric
from torch import nn
from torch.optim import Optimizer

from lightning_dist.data import validate_same_batches
from lightning_dist.layout import ParallelMesh
from lightning_dist.parallel import SingleProcessRunner, average_buffers
from lightning_dist.parallel.buffers import make_copies_equal
from lightning_dist.parallel.single_process import CALL
from lightning_dist.placeholder import held


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
        mesh: of the layout.
        takes_part: called before each forward with gradients.

    Communication: what ``parallel`` does. At the first training forward see :func:`make_copies_equal`, and under ``tp``
    one all-reduce of a digest of the first batch in training and in evaluation; at the first forward in evaluation mode
    after training see :func:`average_buffers`.
    """

    def __init__(
        self,
        module: nn.Module,
        parallel: SingleProcessRunner,
        mesh: ParallelMesh,
        takes_part: Callable[[InLayout], None],
    ) -> None:
        super().__init__()
        self.module = module
        self.parallel = parallel
        self.had_backward = False
        """Whether a backward pass of Fabric's ran since the last step."""
        self.is_unreduced = False
        """Whether gradients were added up that no rank has had from the others."""
        self.is_stepped = False
        """Whether an optimizer has stepped on all that it trains since its last forward."""
        self._parameters_of_module = {id(p): p for p in module.parameters()}  # between passes units may show others
        self._mesh = mesh
        self._takes_part = takes_part
        self._compared: set[str] = set()
        self._has_trained = False
        self._is_new = True

    @staticmethod
    def prepare(module: nn.Module) -> None:
        """Called before the module is divided: names what a strategy runs, see :data:`CALL`."""
        vars(module)[CALL] = partial(nn.Module.__call__, module)

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, or a method of it that was marked as one."""
        with _normal_mode():
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
            validate_same_batches(kind, (batch,), self._mesh.root["tp"].get_group())
        if torch.is_grad_enabled():
            self._takes_part(self)
        if trains:
            self._keep_copies_equal()
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
        """Makes buffers equal on all data ranks before they are used or saved, if training may have written them."""
        if self._has_trained and self._mesh.data.size() > 1:
            average_buffers(self.module, self._mesh.data.get_group())
        self._has_trained = False

    def _keep_copies_equal(self) -> None:
        """Once, since code between the setup and the first step may have drawn random values for parameters."""
        if not self._is_new:
            return
        self._is_new = False
        parameters = held(self.module.parameters())
        shards = [p for p in parameters if _is_on_axis(p, "dp_shard")]
        apart = {id(p) for p in shards}
        if self._mesh.data.size() > 1:
            make_copies_equal((p for p in parameters if id(p) not in apart), self._mesh.data.get_group())
        if shards and self._mesh.root["dp_replicate"].size() > 1:
            make_copies_equal(shards, self._mesh.root["dp_replicate"].get_group())

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


def users_compile_options() -> dict[str, Any] | None:
    """Arguments of ``torch.compile``, where the module that Fabric is setting up was compiled; None else.

    Fabric takes the compiled module's wrapper off before a strategy sees it, keeps these in a local variable, and
    compiles what the strategy made of the module, our own code among it (seen in Lightning 2.6.6). That is left alone,
    see :meth:`InLayout.forward`; a strategy compiles the blocks instead.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in (Fabric.setup.__code__, Fabric.setup_module.__code__):
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("compile_kwargs")


def bare(module: nn.Module) -> nn.Module:
    """The user's module of one that was set up."""
    return module.module if isinstance(module, InLayout) else module


def _is_on_axis(parameter: Any, axis: str) -> bool:
    mesh = getattr(parameter, "device_mesh", None)
    return mesh is not None and axis in (mesh.mesh_dim_names or ())


@contextmanager
def _normal_mode() -> Iterator[None]:
    """Inference mode is left for one without gradients: what fully_shard gathers into would be inference tensors, which
    training could not write to later.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
