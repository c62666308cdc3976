"""Private names of torch beside those of fully_shard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives
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

from lightning_dist.compat.names import hands_on, name_of, uses

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


# --- logs, data, elastic ---

functional_collectives = _functional_collectives
hands_on("torch.distributed._functional_collectives", "Collectives that autograd may be built on, of any order.")


RANK_NOT_IN_GROUP = name_of(
    "torch.distributed.distributed_c10d._rank_not_in_group", "The function that every collective asks about its group."
)


@uses("torch.distributed.distributed_c10d._get_default_store")
def default_store() -> Any:
    """The store of the process group of the world, over which its ranks have met."""
    return dist.distributed_c10d._get_default_store()


@uses("torch.distributed.distributed_c10d.ProcessGroup._get_sequence_number_for_group")
def num_collectives(group: dist.ProcessGroup) -> int:
    """How many collectives this rank has begun in a group."""
    return group._get_sequence_number_for_group()  # type: ignore[attr-defined]


@uses("torch.Tensor._backward_hooks", "torch.Tensor._post_accumulate_grad_hooks")
def has_gradient_hooks(tensor: Tensor) -> bool:
    """Whether hooks run when a tensor's gradient is there."""
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


@uses("torch.Tensor._post_accumulate_grad_hooks")
def hooks_after_accumulation(parameter: nn.Parameter) -> Iterable[Any]:
    """The hooks of ``register_post_accumulate_grad_hook``."""
    return (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()


class StandsForLoader:
    """Shows Lightning the iterator of a ``DataLoader`` in whose place it is iterated, by which it ends the workers.

    Args:
        loader: the user's.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    @property
    @uses("torch.utils.data.DataLoader._iterator")
    def _iterator(self) -> Any:
        """Shows Lightning the iterator of the loader itself."""
        return getattr(self.loader, "_iterator", None)

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        if hasattr(self.loader, "_iterator"):
            self.loader._iterator = value


def forget_iterator(loader: Any) -> None:
    """Lets a copy of a ``DataLoader`` begin without the iterator, and the workers, of the one that it was copied of."""
    object.__setattr__(loader, "_iterator", None)


@uses("torch.nn.Module._modules")
def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's children by name, which may be any string here."""
    return module._modules
