"""Private names of torch beside those of fully_shard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed import _functional_collectives

from lightning_dist.compat.names import hands_on, name_of, uses

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
