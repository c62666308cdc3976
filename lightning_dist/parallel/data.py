"""The data axes: replicate, fully shard, hybrid shard; and accumulation that does not reduce."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.overrides.distributed import prepare_for_backward
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric

from lightning_dist.parallel.flat import buckets, flat_broadcast, unflatten
from lightning_dist.parallel.tensor.axis import TensorAxis
from lightning_dist.parallel.usage import Usage, filled
from lightning_dist.placeholder import is_placeholder

# renamed in torch 2.15
_BUFFERS = "forward_sync_buffers"
_NO_BUFFER_BROADCAST: dict[str, Any] = {
    _BUFFERS if _BUFFERS in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers": False
}

STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def average_buffers(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Makes the buffers of all data ranks equal: running statistics to their mean, others to the first rank's.

    The running statistics of a BatchNorm are those of each rank's own samples while training. Their mean over the data
    ranks is what evaluation and checkpoints use; DDP would broadcast rank 0's on every forward pass.

    Communication: one all-reduce and one broadcast over the group, of the buffers' bytes; none without buffers.
    """
    metrics = {b for child in module.modules() if isinstance(child, Metric) for b in child.buffers()}
    norms = [child for child in module.modules() if isinstance(child, _NormBase)]
    statistics = [b for norm in norms for b in norm.buffers(recurse=False) if b.is_floating_point()]
    for same in buckets(statistics):
        flat = torch.cat([b.detach().reshape(-1) for b in same])
        dist.all_reduce(flat, group=group)
        unflatten(flat / dist.get_world_size(group), same)
    averaged = {*metrics, *statistics}
    flat_broadcast([b for b in module.buffers() if b not in averaged and not isinstance(b, DTensor)], group)


class Alone:
    """One data rank: nothing is wrapped, and nothing is communicated but by the tensor axis."""

    tensor: TensorAxis | None = None
    """Of the tensor axis, where the layout has one."""

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module
        self.reduces = True

    def run(self, step: str, *args: Any) -> Any:
        """Runs a step of the LightningModule."""
        output = getattr(self.module, step)(*args)
        if self.tensor is not None:
            self.tensor.after_step()
        return output

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """While it lasts, backward passes add to the gradients without reducing them."""
        self.reduces = False
        try:
            yield
        finally:
            self.reduces = True

    def before_backward(self, loss: Tensor) -> Tensor:
        """The loss to start a backward pass from; called before each."""
        if self.tensor is not None:
            self.tensor.before_backward()
        return loss

    def after_backward(self) -> None:
        """Called after each backward pass."""
        if self.tensor is not None and self.reduces:
            self.tensor.after_backward()

    def reshard(self) -> None:
        """Frees what was gathered for a forward pass that no backward followed. Communication: none."""

    def share_buffers(self) -> None:
        """Makes buffers equal on all stages of a pipeline; called after :func:`average_buffers`."""


class Replicated(Alone):
    """Every data rank holds the whole module; DistributedDataParallel's reducer averages the gradients.

    Communication: per backward pass that reduces, one all-reduce per bucket of gradients (25 MB) over ``group``; none
    while accumulating. Once, at construction, the first rank's parameters and buffers are broadcast.

    The reducer is told of each loss rather than of each forward pass, so a step may do several backward passes, or
    return tensors that the loss does not depend on. Buffers are not broadcast on every forward pass: see
    :func:`average_buffers`.

    [Note: flags of what was used]
    In one process a parameter that the loss does not depend on has no gradient, and the optimizer leaves it alone.
    The reducer wants a gradient of every parameter, so each loss is tied to all of them by an empty one, and what the
    reducer makes of those is taken away again unless some rank used the parameter. Whether one did travels with the
    gradients: the last bucket holds one more parameter, whose "gradient" is a flag for every other one. DDP's own
    ``find_unused_parameters=True`` walks the graph of each loss, and sends what it found in one more all-reduce.
    """

    def __init__(self, module: pl.LightningModule, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(module)
        self.group, self.device = group, device
        self._wrap()

    def _wrap(self) -> None:
        self._parameters = list(self.module.parameters())
        self._requires_grad = [p.requires_grad for p in self._parameters]
        self._trained = [p for p in self._parameters if p.requires_grad]
        self._unused: list[int] = []
        self._token: Tensor | None = None
        self.wrapper: DistributedDataParallel | None = None
        if not self._trained:
            return
        on_cpu = self.device.type == "cpu"
        flagged = _WithFlags(self.module, self._trained[0].new_zeros(len(self._trained)))
        self._flags = flagged.flags
        # DDP on CUDA has to be built on a stream of its own: pytorch.org/docs, notes/cuda
        stream = torch.cuda.stream(torch.cuda.Stream()) if self.device.type == "cuda" else nullcontext()
        with stream:
            self.wrapper = DistributedDataParallel(
                flagged,
                device_ids=None if on_cpu else [self.device.index],
                process_group=self.group,
                **_NO_BUFFER_BROADCAST,
                gradient_as_bucket_view=True,
            )
        # the reducer is C++: a hook that held this would keep it, and the model, alive for good
        self.wrapper.register_comm_hook(weakref.ref(self), _reduce_bucket)

    def run(self, step: str, *args: Any) -> Any:
        if [p.requires_grad for p in self._parameters] != self._requires_grad:
            self._wrap()  # a callback froze or unfroze some; DDP noted them at the start
        if self.wrapper is not None:
            self._token = _first_node(self._flags)
        return super().run(step, *args)

    def before_backward(self, loss: Tensor) -> Tensor:
        if self.wrapper is None or not loss.requires_grad:
            return loss
        self.wrapper.require_backward_grad_sync = self.reduces
        prepare_for_backward(self.wrapper, loss)
        if not self.reduces:
            return loss
        token = self._token if self._token is not None else _first_node(self._flags)
        return _Tied.apply(loss, token, *self._trained)

    def reduce_bucket(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Called by the reducer for each bucket, in order, once all gradients of it are there."""
        if bucket.is_last():  # so all gradients are there
            used = [p.grad is not None for p in self._trained]
            self._unused = [index for index, is_used in enumerate(used) if not is_used]
            assert self._flags.grad is not None
            self._flags.grad.copy_(torch.tensor(used)) if self._unused else self._flags.grad.fill_(1)
            self._flags_travel = _holds(bucket.buffer(), self._flags.grad)
        return allreduce_hook(self.group, bucket)

    def after_backward(self) -> None:
        if self.wrapper is None or not self.reduces:
            return
        flags, self._flags.grad = self._flags.grad, None
        assert flags is not None
        if not self._flags_travel:  # the model has parameters of several dtypes, and theirs were not in the last bucket
            flags = torch.ones_like(flags)
            flags[self._unused] = 0
            dist.all_reduce(flags, group=self.group)
        if self._unused:  # what this rank used, some rank used: so most steps need not look at the flags
            for index, on_ranks in zip(self._unused, flags[self._unused].tolist(), strict=True):
                if not on_ranks:
                    self._trained[index].grad = None


def _reduce_bucket(replicated, bucket):  # DDP refuses annotations that are strings
    return replicated().reduce_bucket(bucket)


class _WithFlags(nn.Module):
    """A module with one more parameter, which comes first so that DDP puts it last."""

    def __init__(self, module: nn.Module, flags: Tensor) -> None:
        super().__init__()
        self.flags = nn.Parameter(flags)
        self.module = module


class _Tied(torch.autograd.Function):
    """The loss, as if it depended on all parameters: what it doesn't depend on is told that no gradient comes."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, token: Tensor, *parameters: Tensor) -> Tensor:
        ctx.num_parameters = len(parameters)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, gradient.new_zeros(()), *(None for _ in range(ctx.num_parameters))


class _Token(torch.autograd.Function):
    """Zeros for the gradient of the flags. Autograd runs what was called first last: DDP orders buckets by that."""

    @staticmethod
    def forward(ctx: Any, flags: Tensor) -> Tensor:
        ctx.flags = flags.detach()  # not saved: several backward passes may go through it
        return flags.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return torch.zeros_like(ctx.flags)


def _first_node(flags: Tensor) -> Tensor:
    with torch.enable_grad():
        return _Token.apply(flags)


def _holds(buffer: Tensor, view: Tensor) -> bool:
    return buffer.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()


class Sharded(Alone):
    """Parameters, gradients and optimizer states are split over ``dp_shard``, and copied over ``dp_replicate``.

    Units are sharded by ``fully_shard`` (FSDP2): each is gathered before its forward and its backward and freed after.

    [Note: the roots of sharding]
    What is in no block belongs to a root. The LightningModule is the root of its steps: what they call, be it the
    network, a method or a layer of it, finds its parameters gathered. In hooks between the steps, calling the module or
    a network of it gathers too. Under manual optimisation a root must not span the step, in which optimizers change
    what was gathered: there each network of the module is a root of its own, gathered when it is called. Scalars,
    which can't be split, and under manual optimisation parameters of the LightningModule itself, stay whole on every
    rank; their gradients are averaged after each backward pass.

    Communication per unit and pass over ``dp_shard``: one all-gather before the forward and one before the backward
    (none for a root's backward), one reduce-scatter after the backward, then one all-reduce of the shard over
    ``dp_replicate`` if that axis is there. Per backward pass that reduces: one small all-reduce over the data ranks,
    see :meth:`~lightning_dist.parallel.usage.Usage.agree`, and one of the gradients of what is whole, if anything is.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        mesh: DeviceMesh,
        blocks: dict[str, nn.Module],
        policy: MixedPrecisionPolicy,
        group: dist.ProcessGroup,
    ) -> None:
        super().__init__(module)
        self.group = group
        self.roots = shard_roots(module)
        self.units = shard_units(module, blocks)
        units = {**self.units, **self.roots}
        whole = unsharded_parameters(module)
        for unit in units.values():
            if not isinstance(unit, FSDPModule):
                fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=whole)
        left = [n for n, p in module.named_parameters() if not isinstance(p, DTensor) and not is_placeholder(p)]
        self.usage = Usage(module, units, set(self.roots), left, group)
        if "" in self.roots and "_root_gathering" not in vars(module):
            vars(module)["_root_gathering"] = _RootGathering(module)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        self._reduce_gradients(False)
        try:
            with super().accumulating():
                yield
        finally:
            self._reduce_gradients(True)

    def _reduce_gradients(self, reduces: bool) -> None:
        for root in self.roots.values():
            assert isinstance(root, FSDPModule)
            root.set_requires_gradient_sync(reduces)

    def reshard(self) -> None:
        for unit in [*self.units.values(), *self.roots.values()]:
            assert isinstance(unit, FSDPModule)
            unit.reshard()

    def run(self, step: str, *args: Any) -> Any:
        with _told_of_shards():
            return super().run(step, *args)

    @contextmanager
    def over_microbatches(self, reshard: bool) -> Iterator[None]:
        """While it lasts, backward passes add to whole gradients, and nothing is reduced: see :meth:`reduce_held`.

        Args:
            reshard: free what was gathered after each pass, and gather it again for the next. Else it stays gathered.
        """
        for unit in self.units.values():
            assert isinstance(unit, FSDPModule)
            unit.set_reshard_after_forward(reshard, recurse=False)
        for root in self.roots.values():
            assert isinstance(root, FSDPModule)
            root.set_reshard_after_backward(reshard)
            root.set_is_last_backward(False)
        self._reduce_gradients(False)
        try:
            yield
        finally:
            for unit in self.units.values():
                assert isinstance(unit, FSDPModule)
                unit.set_reshard_after_forward(True, recurse=False)

    def reduce_held(self) -> None:
        """Reduces the gradients that backward passes over microbatches added up.

        As torch's pipeline schedules do for a stage (``perform_reduce_grad``; private, seen in torch 2.14).

        Communication: one reduce-scatter a unit, as one backward pass has.
        """
        self.usage.before_backward()
        self._reduce_gradients(True)
        for root in self.roots.values():
            assert isinstance(root, FSDPModule)
            root.set_is_last_backward(True)
            root.set_reshard_after_backward(True)
            state = root._get_fsdp_state()
            for inner in state._state_ctx.all_states:
                for group in inner._fsdp_param_groups:
                    group.post_backward()
            state._root_post_backward_final_callback()

    def before_backward(self, loss: Tensor) -> Tensor:
        if isinstance(loss, DTensor):
            raise ValueError(_SHARDS_IN_LOSS)
        self.usage.before_backward()
        return super().before_backward(loss)

    def after_backward(self) -> None:
        if not self.reduces:
            return
        gradients = [filled(p) for p in self.usage.agree()]
        for same in buckets(gradients):
            flat = torch.cat([g.reshape(-1) for g in same])
            dist.all_reduce(flat, group=self.group)
            unflatten(flat / dist.get_world_size(self.group), same)
        super().after_backward()


_SHARDS_IN_LOSS = (
    "a step used parameters of a block outside of the block's forward (in a penalty over self.parameters(), say); "
    "under dp_shard they are split over the ranks there. Use the optimizer's weight_decay, compute the penalty in the "
    "forward of the block, or use dp_replicate"
)


@contextmanager
def _told_of_shards() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "mixed torch.Tensor and DTensor" in str(error):
            error.add_note(_SHARDS_IN_LOSS)
        raise


class _RootGathering:
    """Gathers a LightningModule around the outermost call of its steps and its forward, and of a child between them.

    fully_shard's own hooks of the forward would free the root at the end of ``self(x)`` in a step, for the step's end
    to gather it once more (seen in torch 2.14 and 2.15). See [Note: the roots of sharding].
    """

    def __init__(self, module: Any) -> None:
        self._inside = False
        state = module._get_fsdp_state()
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        module._gather_root = lambda: None
        for name in ("forward", *STEPS, "_gather_root"):
            if name in vars(module) or is_overridden(name, module):
                self._gather_around(module, name)
        for child in module.children():
            child.register_forward_pre_hook(lambda *_: module._gather_root())

    def _gather_around(self, module: Any, name: str) -> None:
        plain = getattr(module, name)
        register_fsdp_forward_method(module, name)
        gathering = getattr(module, name)

        @functools.wraps(plain)
        def outermost(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return plain(*args, **kwargs)
            self._inside = True
            try:
                return gathering(*args, **kwargs)
            finally:
                self._inside = False

        setattr(module, name, outermost)


def unsharded_parameters(module: pl.LightningModule) -> set[nn.Parameter]:
    """What ``fully_shard`` leaves alone: parameters of metrics' own networks, and scalars, which it can't split."""
    metrics = {p for child in module.modules() if isinstance(child, Metric) for p in child.parameters()}
    other_stages = {p for p in module.parameters() if is_placeholder(p)}
    return metrics | other_stages | {p for p in module.parameters() if p.ndim == 0}


def shard_roots(module: pl.LightningModule) -> dict[str, nn.Module]:
    """The modules that own what is in no block, by name; ``""`` is the LightningModule itself.

    See [Note: the roots of sharding].

    Raises:
        ValueError: two networks share a parameter under manual optimisation.
    """
    if module.automatic_optimization:
        return {"": module}
    roots: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if not isinstance(child, Metric) and any(True for _ in child.parameters()):
            roots.update(_callable_modules(name, child))
    if shared := _shared_between(roots):
        raise ValueError(
            f"{' and '.join(shared)} share a parameter, and this module optimises manually: dp_shard can't keep it "
            "in one place while several backward passes run in a step; use dp_replicate, or put both networks "
            "into one module with a forward"
        )
    return roots


def _callable_modules(name: str, module: nn.Module) -> dict[str, nn.Module]:
    """The module, or what a list or a dictionary of modules (which have no forward) holds."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return {name: module}
    found: dict[str, nn.Module] = {}
    for key, child in module.named_children():
        if any(True for _ in child.parameters()):
            found.update(_callable_modules(f"{name}.{key}", child))
    return found


def _shared_between(modules: dict[str, nn.Module]) -> list[str]:
    owner: dict[nn.Parameter, str] = {}
    for name, module in modules.items():
        for parameter in module.parameters():
            if owner.setdefault(parameter, name) != name:
                return [owner[parameter], name]
    return []


def shard_units(module: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The blocks that can be sharded on their own: those that share no parameter with the rest of the module."""
    users: dict[nn.Parameter, int] = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        users[parameter] = users.get(parameter, 0) + 1
    alone = {}
    for name, block in blocks.items():
        inside: dict[nn.Parameter, int] = {}
        for _, parameter in block.named_parameters(remove_duplicate=False):
            inside[parameter] = inside.get(parameter, 0) + 1
        if all(users[parameter] == count for parameter, count in inside.items()):
            alone[name] = block
    return alone
