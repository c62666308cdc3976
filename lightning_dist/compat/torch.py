"""Private names of torch beside those of fully_shard."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import (
    compute_local_shape_and_global_offset as compute_local_shape_and_global_offset,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils._pytree import tree_structure as tree_structure
from torch.utils._pytree import tree_unflatten as tree_unflatten

from lightning_dist.compat.names import hands_on, uses

# --- ground floor ---

StridedShard = _StridedShard

for _name in ("tree_flatten", "tree_leaves", "tree_map", "tree_map_only", "tree_structure", "tree_unflatten"):
    hands_on(f"torch.utils._pytree.{_name}", "walks nested values as torch itself does; there is no public name")
hands_on(
    "torch.distributed.tensor._utils.compute_local_shape_and_global_offset",
    "tells which part of a DTensor a rank holds, as torch's distributed checkpoints ask it",
)
hands_on(
    "torch.distributed.tensor.placement_types._StridedShard",
    "the placement of a tensor that fully_shard divides where the tensor axis has divided it before",
)


@uses("torch.distributed.tensor.DTensor._local_tensor")
def local_tensor(tensor: DTensor) -> Tensor:
    """Gives this rank's part of a divided tensor, without autograd."""
    return tensor._local_tensor
