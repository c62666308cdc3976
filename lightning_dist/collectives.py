"""Collectives beyond torch's: several tensors in one, objects, decisions, and errors that all ranks raise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dist.compat.distributed import timeout_of

T = TypeVar("T")
N = TypeVar("N", bound=Tensor)
E = TypeVar("E", bound=type[Exception])

BUCKET_BYTES = 64 * 2**20
"""How much is copied into one flat tensor, at most, to be sent at once."""


def is_distributed() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def global_rank() -> int:
    """The rank in the world; 0 where there is no process group."""
    return dist.get_rank() if is_distributed() else 0


def num_ranks() -> int:
    """Size of the world; 1 where there is no process group."""
    return dist.get_world_size() if is_distributed() else 1


def host_group(group: dist.ProcessGroup, all_groups: list[list[int]], device: torch.device) -> dist.ProcessGroup:
    """A group of the same ranks for tensors of the host, so that no host waits for its device: on the CPU itself, else
    one of gloo.

    Communication: makes the groups of gloo; every rank of the world calls it, with the ranks of all groups of a kind.
    """
    if device.type == "cpu":
        return group
    made: Any
    made, _ = dist.new_subgroups_by_enumeration(all_groups, timeout_of(group, device), backend="gloo")
    return made


def buckets(tensors: Iterable[N], most: int = BUCKET_BYTES) -> Iterator[list[N]]:
    """The tensors in groups of one dtype and at most so many bytes, or one tensor."""
    open_buckets: dict[torch.dtype, list[N]] = {}
    for tensor in tensors:
        bucket = open_buckets.setdefault(tensor.dtype, [])
        if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > most:
            yield bucket
            bucket = open_buckets[tensor.dtype] = []
        bucket.append(tensor)
    yield from open_buckets.values()


def broadcast_tensors(
    tensors: Iterable[Tensor],
    group: dist.ProcessGroup | None,
    source: int = 0,
    device: torch.device | None = None,
) -> None:
    """Gives every rank of the group (None: the world) the values of its rank ``source`` in plain tensors, in place.

    Communication: the tensors' bytes, in broadcasts of one dtype and at most 64 MB (or one tensor) each, by way of
    ``device`` where they lie elsewhere.
    """
    for same in buckets(tensors):
        _copy_into(same, broadcast_parts(same, group, source, device))


def broadcast_parts(
    tensors: list[Tensor], group: dist.ProcessGroup | None, source: int = 0, device: torch.device | None = None
) -> tuple[Tensor, ...]:
    """What one rank of the group has in tensors of one dtype, each flat, on their device or another; they stay as they
    are. One broadcast.
    """
    flat = _flat(tensors, device)
    dist.broadcast(flat, group=group, group_src=source)
    return _split(flat, tensors)


def all_reduce_tensors(
    tensors: Iterable[Tensor], group: dist.ProcessGroup | None, op: Any = dist.ReduceOp.SUM, mean: bool = False
) -> None:
    """Reduces plain tensors over the group (None: the world) in place; for the mean, divides by its ranks.

    Communication: the tensors' bytes, in all-reduces of one dtype and at most 64 MB (or one tensor) each. Memory: see
    :func:`begin_all_reduce`.
    """
    for wait in [begin_all_reduce(same, group, op, mean) for same in buckets(tensors)]:
        wait()


@torch.no_grad()
def begin_all_reduce(
    tensors: list[Tensor], group: dist.ProcessGroup | None, op: Any = dist.ReduceOp.SUM, mean: bool = False
) -> Callable[[], None]:
    """Begins to reduce plain tensors of one dtype over the group (None: the world) in place, by one all-reduce.

    A mean is divided before it is summed, so that it overflows nowhere that its terms don't.

    Returns:
        A function that waits for it: the host on a CPU, the stream on an accelerator. Until then nobody may use them.

    Memory: none by itself, also where there are many tensors, but for copies of those that are not contiguous; gloo
    makes one flat copy of several.
    """
    group = group or dist.group.WORLD
    assert group is not None
    given = [tensor.detach() for tensor in tensors]
    sent = [tensor.contiguous() for tensor in given]  # themselves, where they are
    if mean and sent[0].is_cuda and "nccl" in dist.get_backend(group):
        op = dist.ReduceOp.AVG
    elif mean:
        for tensor in sent:
            tensor.div_(dist.get_world_size(group))
    if len(sent) == 1:
        work: Any = dist.all_reduce(sent[0], op, group, async_op=True)
    else:  # dist.all_reduce_coalesced warns that it will be another function
        options = dist.AllreduceCoalescedOptions()
        options.reduceOp, options.asyncOp = op, True
        work = group.allreduce_coalesced([torch.view_as_real(t) if t.is_complex() else t for t in sent], options)

    def wait() -> None:
        work.wait()
        for tensor, reduced in zip(given, sent, strict=True):
            if reduced is not tensor:
                tensor.copy_(reduced)

    return wait


def _flat(tensors: list[Tensor], device: torch.device | None = None) -> Tensor:
    parts = [tensor.detach().reshape(-1) for tensor in tensors]
    if len({part.device for part in parts}) > 1:
        parts = [part.to(device or parts[0].device) for part in parts]
    return torch.cat(parts).to(device or parts[0].device)


def _split(flat: Tensor, like: list[Tensor]) -> tuple[Tensor, ...]:
    return flat.split([tensor.numel() for tensor in like])


@torch.no_grad()
def _copy_into(tensors: list[Tensor], parts: Iterable[Tensor]) -> None:
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.detach().copy_(part.view(tensor.shape))


def reduce_tensor(tensor: Tensor, group: dist.ProcessGroup, reduce_op: dist.ReduceOp | str | None) -> Tensor:
    """The tensor reduced over the ranks of a group; a new tensor.

    Lightning's own mean of an integer tensor truncates (the mean of batch sizes 6 and 7 becomes 6, seen in 2.6.6);
    here it is taken in float64. ``reduce_op`` is a name (``"mean"``, ``"avg"``, ``"sum"``, ``"min"``, ``"max"``), a
    ``ReduceOp`` or None (sum).

    Communication: one all-reduce over the group, none for a group of one.
    """
    name = reduce_op.lower() if isinstance(reduce_op, str) else None
    mean = name in ("mean", "avg") or reduce_op == dist.ReduceOp.AVG
    tensor = tensor.double() if mean and not tensor.is_floating_point() else tensor.clone()
    num_ranks = dist.get_world_size(group)
    if num_ranks == 1:
        return tensor
    if mean:  # gloo has no ReduceOp.AVG
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group)
        return tensor / num_ranks
    op: Any = getattr(dist.ReduceOp, name.upper()) if name else reduce_op or dist.ReduceOp.SUM
    dist.all_reduce(tensor, op, group)
    return tensor


def reduce_decision(decision: bool, all: bool, device: torch.device) -> bool:
    """Whether all ranks, or any, decide so: the same on each. One all-reduce of a number over the world."""
    if not is_distributed():
        return decision
    verdict = torch.tensor(int(decision), device=device)
    dist.all_reduce(verdict, dist.ReduceOp.MIN if all else dist.ReduceOp.MAX)
    return bool(verdict)


def barrier(device: torch.device) -> None:
    """Waits for all ranks of the world."""
    if is_distributed():
        known = dist.get_backend() == "nccl" and device.index is not None
        dist.barrier(device_ids=[device.index] if known else None)


def broadcast_object(obj: T, source: int = 0, group: dist.ProcessGroup | None = None) -> T:
    """The object of one rank of the world on all ranks, by one broadcast over it, or another group of all ranks."""
    if not is_distributed():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, source, group)
    return box[0]


def gather_objects(obj: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The objects of all ranks of a group, in their order. One all-gather of pickled objects over it."""
    if not is_distributed():
        return [obj]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, obj, group)
    return everyone


_RAISED_AS_THEMSELVES: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ValueError, FileNotFoundError, PermissionError, OSError)
}


def raised_on_all_ranks(kind: E) -> E:
    """Marks a class of errors, made of a message, that :func:`raise_on_all_ranks` raises as itself on every rank."""
    _RAISED_AS_THEMSELVES[kind.__name__] = kind
    return kind


@contextmanager
def raise_on_all_ranks(purpose: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """An error that any rank meets inside is raised on every rank, so that none waits for another.

    Nothing inside may communicate. At the end one all-gather of a short string per rank, over the world or ``group``,
    another one of all ranks for a thread that communicates beside others.

    Raises:
        ValueError, OSError, RuntimeError: that of the lowest rank that failed; where its message alone is none that a
            user can act on, "could not", the ``purpose``, and it.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    verdicts = gather_objects(None if error is None else (type(error).__name__, str(error)), group)
    failed = next((rank for rank, verdict in enumerate(verdicts) if verdict is not None), None)
    if failed is None:
        return
    if error is not None and failed == global_rank():
        raise error
    kind, message = verdicts[failed]
    if kind not in _RAISED_AS_THEMSELVES:
        raise RuntimeError(f"could not {purpose}: rank {failed} met {kind}: {message}") from error
    raise _RAISED_AS_THEMSELVES[kind](message) from error
