"""Parameters of other stages: placeholders while a module is cut, and whole again when it is given back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dist.collectives import broadcast_parts, broadcast_tensors, buckets
from lightning_dist.compat.torch import own_parameters
from lightning_dist.parallel.pipeline.stages import Stages
from lightning_dist.placeholder import is_placeholder, placeholder_parameter


def hide_parameters(module: nn.Module, names: Iterable[str], device: torch.device) -> None:
    """Puts placeholders in place of parameters that other ranks hold; tied ones stay tied. In place."""
    _exchange(module, {name: placeholder_parameter(module.get_parameter(name), device) for name in names})


def whole_of_all_stages(
    module: nn.Module, whole: Mapping[str, Tensor], stages: Stages, group: dist.ProcessGroup, device: torch.device
) -> dict[str, Tensor]:
    """The parameters that this rank has a part of, or a placeholder for, whole; the module's buffers get their values.

    Communication over the pipeline: broadcasts of all parameters and of the buffers that stages use, of at most 64 MB
    (or one tensor) each, by the first rank that holds them.

    Args:
        module: this rank's stages of it.
        whole: plain, by name, what this rank has parts of.
        stages: of the module.
        group: the ranks of the pipeline.
        device: of the group's backend.
    """
    named = {name: whole.get(name, p) for name, p in module.named_parameters() if name in stages.owners}
    sources = {name: stages.holders(name)[0] for name in named}
    shared = share_over_stages(named, sources, group, device, onto=torch.device("cpu"))
    share_buffers(module, stages, group)
    return {**whole, **{name: shared[name] for name, tensor in named.items() if is_placeholder(tensor)}}


@torch.no_grad()
def share_over_stages(
    tensors: Mapping[str, Tensor],
    sources: dict[str, int],
    group: dist.ProcessGroup,
    device: torch.device,
    onto: torch.device | None = None,
) -> dict[str, Tensor]:
    """Tensors that some ranks of a pipeline hold, on all of them.

    Communication over the group: the tensors' bytes, in broadcasts of at most 64 MB (or one tensor) each.

    Args:
        tensors: by name, of the same names, shapes and dtypes on every rank; plain and whole on their source, and
            anything, such as placeholders, on the others. Those that a rank has are given back as they are.
        sources: the rank of the group that sends each.
        group: the ranks of the pipeline.
        device: of the group's backend.
        onto: where received tensors are to be; default: ``device``.
    """
    here, found = dist.get_rank(group), dict(tensors)
    for source in sorted(set(sources.values())):
        names = {id(tensor): name for name, tensor in tensors.items() if sources[name] == source}
        for same in buckets(tensors[name] for name in names.values()):
            mine = here == source
            sent = [t.detach().to(device) if mine else torch.empty(t.shape, dtype=t.dtype, device=device) for t in same]
            for tensor, part in zip(same, broadcast_parts(sent, group, source), strict=True):
                if is_placeholder(tensor):
                    found[names[id(tensor)]] = part.view(tensor.shape).to(onto or device, copy=True)
    return found


def share_buffers(module: nn.Module, stages: Stages, group: dist.ProcessGroup) -> None:
    """Gives every rank the buffers of the stage that uses them, and changes them (BatchNorm's statistics).

    Communication over the pipeline: one broadcast of a rank's buffers, flat.
    """
    buffers = dict(module.named_buffers())
    by_rank: dict[int, list[Tensor]] = {}
    for name, users in stages.buffers.items():
        if name not in buffers:  # that a hook has taken away
            continue
        by_rank.setdefault(stages.schedule.rank_of(users[-1], stages.num_ranks), []).append(buffers[name])
    for rank, owned in sorted(by_rank.items()):
        broadcast_tensors(owned, group, rank)


def _exchange(module: nn.Module, others: dict[str, nn.Parameter]) -> None:
    """Puts other parameters in place of those of these names, wherever the module has them."""
    by_id = {id(module.get_parameter(name)): other for name, other in others.items()}
    for child in module.modules():
        own = own_parameters(child)
        own.update({name: by_id[id(p)] for name, p in own.items() if id(p) in by_id})
