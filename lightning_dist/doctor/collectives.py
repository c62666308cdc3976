"""Latency and bandwidth of each collective in the groups of the axes, and whether it gives the right numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dist.doctor.layouts import Partition
from lightning_dist.doctor.process_groups import join
from lightning_dist.doctor.ranks import run_ranks
from lightning_dist.doctor.results import CheckFailed, CheckSkipped, Finding
from lightning_dist.doctor.settings import Settings

SMALL = 1024
"""Bytes of what latency is measured with."""

LARGE = {"cpu": 4 * 2**20}
LARGE_ON_ACCELERATORS = 64 * 2**20
"""Bytes of what bandwidth is measured with."""

REPEATS, ROUNDS = 5, 3


@dataclass(frozen=True)
class Rate:
    """Of one collective.

    Args:
        collective: its name.
        latency_us: microseconds of a call with 1 KiB.
        gb_per_s: bytes of the larger of input and output over the time, in 1e9 bytes a second.
        bus_gb_per_s: the same times what an ideal ring needs to send of them, to be compared with links: as in
            https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md.
    """

    collective: str
    latency_us: float
    gb_per_s: float
    bus_gb_per_s: float


@dataclass(frozen=True)
class Collective:
    """A collective that is measured.

    Args:
        share: of an output's bytes that pass a link on an ideal ring of so many ranks.
        make: from a tensor of this rank and the group, what calls it and returns the output.
        expect: the output, from the tensors of all ranks and this one's place in the group.
    """

    share: Callable[[int], float]
    make: Callable[[Tensor, dist.ProcessGroup], Callable[[], Tensor]]
    expect: Callable[[list[Tensor], int], Tensor]


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    def call() -> Tensor:
        output.copy_(tensor)
        dist.all_reduce(output, group=group)
        return output

    output = torch.empty_like(tensor)
    return call


def _broadcast(tensor: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    def call() -> Tensor:
        dist.broadcast(output, group=group, group_src=0)
        return output

    output = tensor.clone()
    return call


def _all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    def call() -> Tensor:
        dist.all_gather_single(output, part, group=group)
        return output

    part = tensor.chunk(group.size())[0].contiguous()
    output = part.new_empty(part.numel() * group.size())
    return call


def _reduce_scatter(tensor: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    def call() -> Tensor:
        dist.reduce_scatter_single(output, tensor, group=group)
        return output

    output = tensor.new_empty(tensor.numel() // group.size())
    return call


def _all_to_all(tensor: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    def call() -> Tensor:
        dist.all_to_all_single(output, tensor, group=group)
        return output

    output = torch.empty_like(tensor)
    return call


def _send_receive(tensor: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    def call() -> Tensor:
        sent = dist.P2POp(dist.isend, tensor, group=group, group_peer=(place + 1) % group.size())
        received = dist.P2POp(dist.irecv, output, group=group, group_peer=(place - 1) % group.size())
        for work in dist.batch_isend_irecv([sent, received]):
            work.wait()
        return output

    place, output = group.rank(), torch.empty_like(tensor)
    return call


def _gathered(tensors: list[Tensor], place: int) -> Tensor:
    return torch.cat([tensor.chunk(len(tensors))[0] for tensor in tensors])


def _scattered(tensors: list[Tensor], place: int) -> Tensor:
    return torch.stack(tensors).sum(dim=0).chunk(len(tensors))[place]


def _exchanged(tensors: list[Tensor], place: int) -> Tensor:
    return torch.cat([tensor.chunk(len(tensors))[place] for tensor in tensors])


COLLECTIVES = {
    "all_reduce": Collective(lambda n: 2 * (n - 1) / n, _all_reduce, lambda t, place: torch.stack(t).sum(dim=0)),
    "all_gather": Collective(lambda n: (n - 1) / n, _all_gather, _gathered),
    "reduce_scatter": Collective(lambda n: (n - 1) / n, _reduce_scatter, _scattered),
    "all_to_all": Collective(lambda n: (n - 1) / n, _all_to_all, _exchanged),
    "broadcast": Collective(lambda n: 1.0, _broadcast, lambda t, place: t[0]),
    "send/recv": Collective(lambda n: 1.0, _send_receive, lambda t, place: t[place - 1]),
}


def check_collectives(settings: Settings, partition: Partition, axes: list[str]) -> Finding:
    """All groups of a partition at once, as in a training; the slowest rank counts."""
    by_rank: list[list[Rate | None]] = run_ranks(settings, measure, settings, partition)
    rates, unsupported = [], []
    for name, of_ranks in zip(COLLECTIVES, zip(*by_rank, strict=True), strict=True):
        measured = [rate for rate in of_ranks if rate is not None]
        if measured:
            rates.append(_slowest(measured))
        else:
            unsupported.append(name)
    told = "; ".join(f"{r.collective} {r.latency_us:.0f} us, {r.gb_per_s:.2f} GB/s" for r in rates[:2])
    missing = f"; not supported: {', '.join(unsupported)}" if unsupported else ""
    of_axes = axes[0] if len(axes) == 1 else f"{axes[0]} and {len(axes) - 1} more"
    details = {"groups": [list(ranks) for ranks in partition], "axes": axes, "rates": [asdict(rate) for rate in rates]}
    return Finding(f"{told}{missing} (ranks of {of_axes})", details)


def skip_collectives(settings: Settings) -> Finding:
    """In place of the groups where there are none."""
    raise CheckSkipped(f"{settings.num_ranks} rank has nobody to talk to; pass --accelerator cpu, or more --devices")


def measure(settings: Settings, partition: Partition) -> list[Rate | None]:
    """On a rank: every collective in its group, in the order of :data:`COLLECTIVES`; None for what is not supported.

    Raises:
        CheckFailed: one gives wrong numbers.
    """
    device = join(settings).device
    group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in partition])
    assert isinstance(group, dist.ProcessGroup)
    large = LARGE.get(device.type, LARGE_ON_ACCELERATORS)
    return [_measure_one(name, group, device, large) for name in COLLECTIVES]


def _measure_one(name: str, group: dist.ProcessGroup, device: torch.device, large: int) -> Rate | None:
    try:
        _assert_right(name, group, device)
    except (RuntimeError, NotImplementedError) as error:
        if "support" in str(error) or "implement" in str(error):
            return None
        raise
    small_time, large_time = (_time(name, group, device, num_bytes) for num_bytes in (SMALL, large))
    rate = large / large_time / 1e9
    return Rate(name, small_time * 1e6, rate, rate * COLLECTIVES[name].share(group.size()))


def _assert_right(name: str, group: dist.ProcessGroup, device: torch.device) -> None:
    tensors = [
        torch.arange(8 * group.size(), dtype=torch.float32, device=device) + 100 * n for n in range(group.size())
    ]
    output = COLLECTIVES[name].make(tensors[group.rank()], group)()
    if not torch.equal(output, COLLECTIVES[name].expect(tensors, group.rank())):
        raise CheckFailed(f"{name} over ranks {dist.get_process_group_ranks(group)} gives wrong numbers")


def _time(name: str, group: dist.ProcessGroup, device: torch.device, num_bytes: int) -> float:
    """Seconds of a call: the shortest of some rounds."""
    elements = num_bytes // 4 // group.size() * group.size()
    call = COLLECTIVES[name].make(torch.ones(elements, dtype=torch.float32, device=device), group)
    times = []
    for _ in range(ROUNDS):
        _wait(device)
        dist.barrier(group)
        begin = time.perf_counter()
        for _ in range(REPEATS):
            call()
        _wait(device)
        times.append((time.perf_counter() - begin) / REPEATS)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _slowest(rates: list[Rate]) -> Rate:
    return Rate(
        rates[0].collective,
        max(rate.latency_us for rate in rates),
        min(rate.gb_per_s for rate in rates),
        min(rate.bus_gb_per_s for rate in rates),
    )
