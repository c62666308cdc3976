"""What data ranks hold alike stays equal: buffers that training writes, statistics, parameters a hook drew anew."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchmetrics import Metric

from lightning_dist.collectives import all_reduce_tensors, broadcast_parts, broadcast_tensors
from lightning_dist.compat.torch import NormBase, own_buffers, preserve_versions, version_of
from lightning_dist.dtensors import local_part
from lightning_dist.patches import Patches


def share_batch_statistics(module: nn.Module, group: dist.ProcessGroup, patches: Patches) -> None:
    """Has SyncBatchNorm layers for which the user named no ranks share statistics over ``group``, until an undo.

    By themselves they share over the world, where stages lack the layer and ranks of ``tp`` have the same samples.
    """
    if dist.get_world_size(group) < dist.get_world_size():
        for child in module.modules():
            if isinstance(child, nn.SyncBatchNorm) and child.process_group is None:
                patches.set(child, "process_group", group)


def average_buffers(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Makes the buffers of all data ranks equal: running statistics to their mean, others to the first rank's.

    The running statistics of a BatchNorm are those of each rank's own samples while training. Their mean over the data
    ranks is what evaluation and checkpoints use; DDP would broadcast rank 0's on every forward pass.

    Communication: one all-reduce and one broadcast over the group, of the buffers' bytes; none without buffers.
    """
    metrics = {b for child in module.modules() if isinstance(child, Metric) for b in child.buffers()}
    norms = [child for child in module.modules() if isinstance(child, NormBase)]
    statistics = [b for norm in norms for b in norm.buffers(recurse=False) if b.is_floating_point()]
    averaged = {*metrics, *statistics}
    others = [b for b in module.buffers() if b not in averaged and not isinstance(b, DTensor)]
    all_reduce_tensors(statistics, group, mean=True)
    with preserve_versions(tuple(b for b in others if not b.is_inference())):  # these are no writes of training's
        broadcast_tensors(others, group)


class WrittenBuffers:
    """Every data rank begins a training step with the first rank's values of the buffers that training writes, as under
    ddp; but for BatchNorm's statistics, see :func:`average_buffers`, and what metrics hold.

    [Note: which buffers training writes]
    Most buffers are constants (masks, frequencies), and to send them with every step would cost for nothing. One was
    written if its version counter moved, or another tensor took its place. All ranks have to know alike what is sent,
    and a write may depend on the samples of a rank: so each tells the others what it wrote along with something that
    the step communicates anyway (see the callers of :meth:`written`), and what they agree on there is sent from then
    on, before each training step. Where a Trainer ends a batch, its ranks hear of any write, and all ask; in a loop of
    the user's they hear of what all have written. Before the second step they ask each other outright, once, since
    most of what is ever written is written by then.

    Args:
        module: whose buffers they are.
        group: the data ranks.

    Communication: once training wrote a buffer, one broadcast per dtype over ``group`` before each training step, of
    the buffers that it writes; none where it writes none. Before the second, see :meth:`agree`.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup) -> None:
        self.group = group
        self._buffers = [_Buffer(owner, name, tensor) for owner, name, tensor in _candidates(module)]
        self._num_steps = 0

    def __len__(self) -> int:
        return len(self._buffers)

    @property
    def device(self) -> torch.device:
        """The first buffer's."""
        return self._buffers[0].device

    def written(self) -> list[int]:
        """Numbers of the buffers that training wrote, but for those that are sent already. Communication: none."""
        return [number for number, buffer in enumerate(self._buffers) if not buffer.is_sent and buffer.was_written]

    def send(self, numbers: Iterable[int]) -> None:
        """These are sent before each training step from now on; called alike on every rank."""
        for number in numbers:
            self._buffers[number].is_sent = True

    def before_step(self) -> None:
        """Called before each training step."""
        self._num_steps += 1
        if self._num_steps == 1:
            for buffer in self._buffers:
                buffer.note()
        elif self._num_steps == 2:
            self.agree()
        sent = [buffer for buffer in self._buffers if buffer.is_sent]
        for dtype in dict.fromkeys(buffer.dtype for buffer in sent):
            self._send([buffer for buffer in sent if buffer.dtype == dtype])

    def agree(self) -> None:
        """What any rank has written is sent from now on. Communication: one all-reduce of 4 bytes per buffer."""
        if not self._buffers:
            return
        flags = torch.zeros(len(self), dtype=torch.int32)
        flags[self.written()] = 1
        flags = flags.to(self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        self.send(number for number, is_written in enumerate(flags.tolist()) if is_written)

    @torch.no_grad()
    def _send(self, same: list[_Buffer]) -> None:
        """What has another shape on the first rank, or here (a cache by length), stays as it is."""
        parts = iter(broadcast_parts([part for buffer in same for part in buffer.packed()], self.group))
        if dist.get_rank(self.group) != 0:
            for buffer in same:
                buffer.take(next(parts), next(parts))


class _Buffer:
    """One that training may write, where the module has it now."""

    def __init__(self, owner: nn.Module, name: str, tensor: Tensor) -> None:
        self._owner, self._name = owner, name
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.is_sent = False
        self._noted: tuple[weakref.ref[Tensor], int] | None = None

    @property
    def _tensor(self) -> Tensor | None:
        """None where it is not what it was at first."""
        tensor = own_buffers(self._owner).get(self._name)
        return tensor if tensor is not None and (tensor.shape, tensor.dtype) == (self.shape, self.dtype) else None

    def note(self) -> None:
        if (tensor := self._tensor) is not None:
            self.device = tensor.device
            self._noted = weakref.ref(tensor), version_of(tensor)

    @property
    def was_written(self) -> bool:
        if self._noted is None or (tensor := self._tensor) is None:
            return False
        return tensor is not self._noted[0]() or version_of(tensor) != self._noted[1]

    def packed(self) -> tuple[Tensor, Tensor]:
        """Its elements, and whether there are any."""
        tensor = self._tensor
        if tensor is not None:
            self.device = tensor.device
            return tensor.reshape(-1), tensor.new_ones(1)
        return torch.zeros(self.shape.numel() + 1, dtype=self.dtype, device=self.device).split([self.shape.numel(), 1])

    def take(self, elements: Tensor, are_there: Tensor) -> None:
        if (tensor := self._tensor) is not None:
            if tensor.is_inference():  # validation put it there
                tensor = own_buffers(self._owner)[self._name] = tensor.clone()
            tensor.copy_(torch.where(are_there.bool(), elements, tensor.reshape(-1)).view(tensor.shape))


def _candidates(module: nn.Module) -> Iterable[tuple[nn.Module, str, Tensor]]:
    """Not what is in a metric: that is reduced when it is computed."""
    in_metrics = {child for metric in module.modules() if isinstance(metric, Metric) for child in metric.modules()}
    for child in module.modules():
        if not isinstance(child, NormBase) and child not in in_metrics:
            for name, tensor in own_buffers(child).items():
                if tensor is not None and not isinstance(tensor, DTensor):
                    yield child, name, tensor


@torch.no_grad()
def make_copies_equal(parameters: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Gives every rank the first one's values of what differs, and says so.

    A hook that draws random numbers (a head that is initialised anew, noise on weights) draws other ones on each data
    rank, and copies that differ once drift apart for good. One process has one draw: the first rank's is taken.

    Args:
        parameters: of which the ranks of the group hold the same part, in the same order.
        group: those ranks.

    Communication: one all-reduce of 16 bytes a parameter over the group, and a wait of the host for it; a broadcast of
    what differs.
    """
    tensors = [t for t in map(local_part, parameters) if t.numel() and t.is_floating_point()]
    if not tensors:
        return
    wide = torch.float64
    marks = torch.stack([torch.linalg.vector_norm(t, dtype=wide) + t.sum(dtype=wide) for t in tensors])
    extremes = torch.stack([marks, -marks])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
    most, least = extremes
    differ = [tensor for tensor, same in zip(tensors, (most == -least).tolist(), strict=True) if not same]
    if differ:
        broadcast_tensors(differ, group)
        rank_zero_warn(
            f"{len(differ)} parameters had other values on other data ranks, written by code that draws random numbers "
            "or reads a rank's own samples; all ranks now have the first one's"
        )
