"""Which part of a parameter a rank of the tensor axis holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement

from lightning_dist.compat.distributed import StridedShard
from lightning_dist.compat.torch import own_parameters
from lightning_dist.divided import whole


def shard_placement(dim: int, packed: int = 1) -> Placement:
    """Split along a dim; of each of ``packed`` equal pieces along it (q, k, v in one matrix) if there are several.

    See [Note: placements on the tensor axis].
    """
    return Shard(dim) if packed == 1 else StridedShard(dim, split_factor=packed)


def shard_of(tensor: Tensor, placement: Placement, mesh: DeviceMesh) -> Tensor:
    """This rank's part of a tensor that is whole on each rank of a one-axis mesh, a copy. Communication: none."""
    assert isinstance(placement, (Shard, StridedShard))
    pieces = tensor.chunk(getattr(placement, "split_factor", 1), placement.dim)
    return torch.cat([_chunk(piece, placement.dim, mesh) for piece in pieces], placement.dim).clone()


def on_axis(tensor: DTensor, axis: str) -> Tensor:
    """This rank's part of a tensor as that axis alone divides it.

    Communication: none where no other axis divides it; else those of :func:`~lightning_dist.divided.whole.whole`.
    """
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names or ()
    others = [p for name, p in zip(names, tensor.placements, strict=True) if name != axis and not p.is_replicate()]
    if not others:
        return tensor.to_local()
    placement = tensor.placements[names.index(axis)]
    return shard_of(whole(tensor), placement, mesh[axis])


def _chunk(piece: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """As ``Tensor.chunk``, with an empty part for ranks that come too late."""
    chunks = piece.chunk(mesh.size(), dim)
    rank = mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else piece.narrow(dim, 0, 0)


def split_parameter(root: nn.Module, owner: nn.Module, name: str, placement: Placement, mesh: DeviceMesh) -> None:
    """Replaces a parameter of ``owner`` by a DTensor with its global shape, also where ``root`` ties it to other names.

    Nothing happens if it is None or split already. Communication: none.

    Raises:
        ValueError: it is no plain parameter of its owner.
    """
    if name not in own_parameters(owner):
        raise ValueError(
            f"tp can't divide the {name} of a {type(owner).__name__}, which is no plain parameter there "
            "(parametrised, or pruned); leave the layer whole with tensor_plan="
        )
    plain = own_parameters(owner)[name]
    if plain is None or isinstance(plain, DTensor):
        return
    part = shard_of(plain.detach(), placement, mesh)
    split = nn.Parameter(
        DTensor.from_local(part, mesh, [placement], run_check=False, shape=plain.shape, stride=plain.stride()),
        requires_grad=plain.requires_grad,
    )
    split.__dict__.update(plain.__dict__)  # marks that models put on their parameters
    for module in root.modules():
        parameters = own_parameters(module)
        for key in [key for key, parameter in parameters.items() if parameter is plain]:
            parameters[key] = split
